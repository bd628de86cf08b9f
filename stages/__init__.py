"""The scripts of the DVC stages. `python -m stages.training` in the repository folder runs one stage."""
