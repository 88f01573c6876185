"""Spends a budget."""
