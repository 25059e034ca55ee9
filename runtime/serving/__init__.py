"""Serving: tokens in, logits out, over KV caches; and generation."""
