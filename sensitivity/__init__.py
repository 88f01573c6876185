"""The straight line from a vision-language model to a recommended mixed-precision plan."""
