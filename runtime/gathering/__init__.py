"""Sharded parameters: gathered ahead of use, and again for backward."""
