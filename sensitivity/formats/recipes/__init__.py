"""Export formats that are configurations: the runtime's own tool makes the weights."""
