"""Studies, training and benchmarks that use `sensitivity`; run each from the repository root with `python -m`."""
