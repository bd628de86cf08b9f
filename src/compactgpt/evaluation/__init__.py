"""Scores of any language model by document, tasks, generated text, and the baselines."""
