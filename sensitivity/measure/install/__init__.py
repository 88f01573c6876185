"""Installs a plan's quantized weights in a model, and restores its own weights afterwards."""
