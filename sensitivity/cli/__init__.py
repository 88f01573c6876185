"""The command line: one file per verb; nothing else in the package prints."""
