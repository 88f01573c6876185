"""The public functions that connect analyses and models, such as sweep, recommend and export."""
