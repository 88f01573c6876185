"""The examples of a study: what was asked, and counts of what happened to the answers."""
