"""Export formats that are configurations, from which the runtime's own tool makes the weights."""
