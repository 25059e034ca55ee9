"""Training a sharded module: gradient norms, optimizers and checkpoints of a run."""
