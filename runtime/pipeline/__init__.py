"""Pipelines: stages of a model on ranks of their own, micro-batches that pass through them."""
