"""The scripts of the DVC stages. `python -m stages.training` runs the training."""
