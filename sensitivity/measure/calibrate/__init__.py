"""Statistics of what each layer reads, from calibration data."""
