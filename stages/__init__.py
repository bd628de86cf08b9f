"""Doors: one typer script a DVC stage, run as `python -m stages.X` from the repository folder."""
