"""What needs the gradient of the loss of the right answers, on calibration data alone."""
