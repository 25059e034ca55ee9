"""Attention over a sequence that ranks share: one declaration per algorithm."""
