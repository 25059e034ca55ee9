"""Plans in the words of other tools: one file for each target, `registry.py` has them all."""
