"""The loop around solving: meshes, orders of tokens, recomputation, variants of a graph."""
