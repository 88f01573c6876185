"""What is printed: tables, and the progress of a sweep."""
