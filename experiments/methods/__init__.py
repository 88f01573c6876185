"""Quantization methods compared on the embedded models, which run on a laptop."""
