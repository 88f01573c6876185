"""Predicts the time, disk and memory of a sweep before any weight is loaded."""
