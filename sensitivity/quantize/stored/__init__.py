"""What a method returns: codes, and the scales or tables that turn them into numbers again."""
