"""Functions and classes for all modules of compactgpt."""
