"""Calibration: collects statistics of each layer's inputs from forward passes over calibration data."""
