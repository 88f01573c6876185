"""Verbs that measure time and memory on this machine."""
