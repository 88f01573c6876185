"""The public functions: sweep, recommend and export, which connect analyses and models."""
