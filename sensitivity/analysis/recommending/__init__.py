"""Recommendation: the plan to use, and whether measurements support it over its rivals."""
