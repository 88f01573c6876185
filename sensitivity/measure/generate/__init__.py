"""Examples as tensors, and greedy answers."""
