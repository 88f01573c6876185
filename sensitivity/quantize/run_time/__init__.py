"""What is rounded in each forward pass: the inputs of layers, attention's probabilities, and cached keys and values."""
