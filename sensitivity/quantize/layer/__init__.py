"""What a method gets: weights that read the same input, and the statistics of that input."""
