"""Values: components, schemes, plans and what they weigh; no torch, no pandas."""
