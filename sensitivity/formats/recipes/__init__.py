"""Formats that are a configuration: the runtime's own tool makes the weights."""
