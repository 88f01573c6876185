"""Export formats, one module each: they write a plan as files that a runtime loads."""
