"""Fits a description of a cluster on measurements, and measures this machine."""
