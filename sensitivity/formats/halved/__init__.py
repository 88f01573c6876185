"""A model in two halves that a runtime executes one after the other: image to features, and tokens to logits."""
