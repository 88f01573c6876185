"""What is rounded anew in each forward pass: the inputs of layers, and attention's keys and values."""
