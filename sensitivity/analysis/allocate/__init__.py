"""Allocation: which plans of at most a given size, time or score lost are predicted to be best."""
