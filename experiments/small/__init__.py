"""Small random models in real formats and small data sets in official layouts, for smoke runs and tests."""
