"""Finds, from calibration data, how layers' inputs and attention are rounded in each forward pass."""
