"""Export formats that hold weights."""
