"""The plan in words and tables."""
