"""The torch wing: a plan into a model, answers and scores out."""
