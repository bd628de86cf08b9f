"""Log what stages do, copy the logs to MLflow, and compare or reproduce runs."""

from compactgpt.tracking.journal import state_folder

__all__ = ["state_folder"]
