"""Allocation: which plan to use within a budget, and whether measurements support the choice."""
