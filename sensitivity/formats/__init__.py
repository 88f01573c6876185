"""Exports: a plan as the files that a runtime loads; one file per format."""
