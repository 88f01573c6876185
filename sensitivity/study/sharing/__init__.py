"""Studies as data for others: tidy tables, and a card that says what is in them."""
