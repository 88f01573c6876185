"""What the command line prints: tables, and the progress of a sweep."""
