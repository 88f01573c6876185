"""Methods on integer grids, and the column-wise solver that other grids use too."""
