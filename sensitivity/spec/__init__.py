"""Plain values: components, schemes, plans, their sizes and what runtimes can load; no torch, no pandas."""
