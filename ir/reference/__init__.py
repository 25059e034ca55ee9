"""Graphs run in one process: the reference for tests and `plan verify`."""
