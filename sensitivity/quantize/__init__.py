"""A weight, its scheme and its statistics give what is stored. Knows tensors; no models and no tasks."""
