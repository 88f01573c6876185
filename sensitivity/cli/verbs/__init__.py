"""One file per verb: its flags, what it runs, and what it prints."""
