"""The base of generated modules: parameters, layers, checkpoints."""
