"""The table wing: what the trials of a study say. Never imports torch."""
