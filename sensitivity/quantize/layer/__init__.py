"""What a method is given: weights that read one input, and the statistics of that input."""
