"""Loads models and names their parts; what differs between model families is data."""
