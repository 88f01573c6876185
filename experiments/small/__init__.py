"""Small random models in the real formats, and small data sets in the official layouts: for smoke runs and tests."""
