"""MLflow: stages write a journal on disk, a child process copies it to the tracking server."""

from compactgpt.tracking.journal import state_folder

__all__ = ["state_folder"]
