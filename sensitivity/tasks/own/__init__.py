"""Tasks from a user's own data."""
