"""What a sweep will cost, before any weight is loaded."""
