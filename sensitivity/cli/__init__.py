"""The command line, with one file per verb; the rest of the package prints nothing."""
