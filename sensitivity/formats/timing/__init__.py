"""Measures time and memory in a runtime: of an export beside full precision, and of each layer."""
