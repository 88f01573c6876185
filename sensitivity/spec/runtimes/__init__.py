"""What each runtime can load, as data, and the rules that plans break."""
