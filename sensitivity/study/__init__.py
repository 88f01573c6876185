"""Studies on disk: trials, answers and the queue; sweeps write them, analyses read them."""
