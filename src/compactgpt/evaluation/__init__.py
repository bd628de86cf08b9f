"""Evaluate our model and the baselines: per-document losses, tasks and generated text."""
