"""Quantization of one weight: from a weight, its scheme and its statistics to what is stored."""
