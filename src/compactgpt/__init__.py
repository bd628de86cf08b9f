"""compactgpt: train a compact GPT, measure it against GPT-2, and show where every number came from."""

__version__ = "0.2.0"
