"""Measures plans with torch: puts a plan into a model, generates answers and scores them."""
