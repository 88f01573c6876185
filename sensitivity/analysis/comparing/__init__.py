"""Two plans or two studies against each other, paired where they have seen the same examples."""
