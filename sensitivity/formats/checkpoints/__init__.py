"""Formats that hold weights."""
