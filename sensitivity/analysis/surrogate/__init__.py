"""The surrogate: a model that predicts the score of plans that were not measured."""
