"""What plans share in memory, and what happens when memory runs out."""
