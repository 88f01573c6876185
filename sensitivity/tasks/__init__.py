"""Tasks: what a model is asked, and what counts as a right answer."""
