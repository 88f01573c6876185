"""How much of the score each component decides."""
