"""What forward passes need: batches of calibration data, the modules of blocks, and hooks that change attention."""
