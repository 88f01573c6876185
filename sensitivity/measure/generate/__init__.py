"""Turns examples into tensors, and generates greedy answers from them."""
