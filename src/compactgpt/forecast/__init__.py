"""Estimates of the cost and the loss of a training run, made before the run."""
