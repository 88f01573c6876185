"""Turns examples into tensors, and generates answers from them."""
