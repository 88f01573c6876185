"""Methods on other grids: codebooks, bit planes, binary weights, and outliers that are stored apart."""
