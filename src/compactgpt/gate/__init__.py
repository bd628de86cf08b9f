"""The gate: check a model for metric regressions, and render the verdict for users, GitHub and CI."""
