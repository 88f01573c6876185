"""Where trials are kept: a journal in the folder of the study, or a database."""
