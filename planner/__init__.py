"""Strategies, the sharding problem, its solvers, the plan."""
