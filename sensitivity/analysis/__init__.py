"""The analyses of a study's trials: importance, surrogate, search, allocation, report; never imports torch."""
