"""Which plans to try."""
