"""Predicts the score of plans that were not measured."""
