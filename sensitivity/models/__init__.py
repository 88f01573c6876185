"""Loading a model and naming its parts: what is particular to a family is data."""
