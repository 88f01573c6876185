"""The straight line as functions."""
