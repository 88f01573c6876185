"""Computes gradients on calibration data: of the answer loss, and of errors of blocks and layers."""
