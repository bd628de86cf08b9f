"""Evaluate language models: per-document losses, tasks and generated text, ours and the baselines."""
