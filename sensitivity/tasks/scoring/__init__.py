"""The rules by which an answer becomes a score."""
