"""The types of a task: an example, its image, and the task that it belongs to."""
