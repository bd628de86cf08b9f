"""The commands of `compactgpt`, one module for each group that `compactgpt --help` shows."""
