"""The mesh of ranks: axes, collectives with gradients, layouts of slices."""
