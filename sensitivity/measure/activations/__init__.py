"""Finds from calibration data how inputs, attention and its probabilities are rounded in each forward pass."""
