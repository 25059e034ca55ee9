"""What may be chosen per operator, what it costs, and the problem built of it."""
