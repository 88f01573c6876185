"""Plans as users of other tools would choose them, beside ours."""
