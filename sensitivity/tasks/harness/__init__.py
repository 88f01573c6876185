"""Tasks of lmms-eval, with its prompts, answer rules and metrics."""
