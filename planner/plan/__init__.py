"""The plan: decisions, the program of a rank, what it moves, and plan.json."""
