"""Importance: how much of the score each component decides, with intervals and checks."""
