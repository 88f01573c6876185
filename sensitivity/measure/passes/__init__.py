"""Forward passes over calibration data: the inputs of a batch, and the modules of transformer blocks."""
