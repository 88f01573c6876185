"""A model in two halves, image to features and tokens to logits: what a runtime executes, one after the other."""
