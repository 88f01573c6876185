"""What each runtime can load, the rules that a plan breaks, and the time and memory that a plan takes."""
