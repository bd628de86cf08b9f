"""One typer script per DVC stage, run as `python -m stages.X` from the repository folder."""
