"""Tasks of evaluation libraries, with their prompts, answer rules and metrics."""
