"""An example, its image, and the task that it belongs to."""
