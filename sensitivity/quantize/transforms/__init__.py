"""Transforms: exact changes of a weight and its input, after which rounding costs less."""
