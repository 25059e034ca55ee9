"""The operators: factor rules, and what follows from them."""
