"""Additional processes for one sweep, on this machine or on a Ray cluster."""
