"""Scoring: how an answer becomes a number."""
