"""Failures: which answers of a plan changed against another, with their questions and images."""
