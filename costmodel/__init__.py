"""Clusters, compute and collective costs, memory."""
