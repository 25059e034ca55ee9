"""Clusters: GPUs and links with their figures, built in or from a TOML file."""
