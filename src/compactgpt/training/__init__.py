"""The training loop, optimizers, checkpoints, and training by several processes."""
