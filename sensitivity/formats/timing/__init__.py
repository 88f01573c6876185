"""Measures times and memory of an export in its runtime, beside full precision in the same run."""
