"""Command-line arguments: shared flags, the values that they take, and the parser."""
