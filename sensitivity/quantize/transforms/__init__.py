"""Transforms: changes of a weight and its input that leave their product the same, and make rounding cost less."""
