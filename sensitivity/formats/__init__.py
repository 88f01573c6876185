"""A plan as files that a runtime loads; one file per format."""
