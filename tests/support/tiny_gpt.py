"""A shape of a GPT and tokens, small enough for hand work."""

import numpy as np
import torch

from compactgpt.config import Model

TINY = {
    "block_size": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 50,
    "padded_vocab_size": 64,
    "bias": False,
    "dropout": 0.0,
}


def tiny(**changes):
    return Model(**{**TINY, **changes})


def tokens_of(batch, length, vocab=50, seed=3):
    drawn = np.random.default_rng(seed).integers(0, vocab, (batch, length + 1))
    return torch.from_numpy(drawn[:, :-1]), torch.from_numpy(drawn[:, 1:])
