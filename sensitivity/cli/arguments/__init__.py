"""The command line as values: flags, what they take, and how they are read."""
