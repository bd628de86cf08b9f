"""The gate: check a model for metric regressions."""
