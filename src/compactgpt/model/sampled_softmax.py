"""Sampled softmax: each training step uses a random sample of the vocabulary.

Training adds -log(p) to the logit of a token that is sampled with probability p. Then the sum of exponentials
over a sample is, on average, the sum over the whole vocabulary (Horvitz and Thompson 1952).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SMOOTHING = 1.0  # added to each count: tokens that the train split lacks are sampled, too
COUNTED_AT_ONCE = 1 << 24  # tokens in one call of np.bincount, which copies them as int64
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The tokens over which one training step computes the softmax."""

    ids: Ints  # (K,) token ids, ascending
    log_inclusion: npt.NDArray[np.float32]  # (K,) log of the probability that a sample contains the token

    def positions(self, tokens: Ints) -> Ints:
        """Return the index of each token in `ids`; `ids` must contain all tokens."""
        return np.searchsorted(self.ids, tokens)


def token_counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> Ints:
    """Return how often each token id occurs in `tokens`. (tokens,) -> (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def inclusion_probabilities(counts: Ints, size: int, power: float) -> Floats:
    """Return, for each token, the probability that a sample contains this token. (V,) -> (V,).

    The probability is min(1, c (count + 1)^power). The constant c is chosen so that all probabilities add up
    to `size`, the average number of tokens in a sample. Mikolov et al. 2013 use power 0.75.
    """
    if size >= len(counts):
        return np.ones(len(counts))
    weights = (counts + SMOOTHING) ** power
    ordered = np.sort(weights)[::-1]
    sums = np.cumsum(ordered[::-1])[::-1]  # (V,) sums[k] is the sum of ordered[k:]
    k = np.arange(len(ordered))  # (V,) candidates for the number of tokens whose probability is 1
    # If the k most frequent tokens have probability 1, c[k] makes all other probabilities add up to size - k.
    c = (size - k) / sums  # (V,)
    # Use the smallest k for which the largest of the other probabilities, c[k] * ordered[k], is at most 1.
    smallest_k = int(np.argmax(c * ordered <= 1))
    inclusion: Floats = np.minimum(1.0, c[smallest_k] * weights)
    return inclusion


def draw_sample(inclusion: Floats, batch: Ints, *, seed: int, step: int) -> Sample:
    """Draw a sample of the vocabulary for a training step, counted from 0.

    `inclusion`, (V,), has each token's probability to be sampled. The tokens of `batch` are always sampled.
    """
    # `training_batch` uses the same key with counter 0. Another counter gives independent random numbers.
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, 1]))
    chosen = generator.random(len(inclusion)) < inclusion
    probability = inclusion.copy()
    chosen[batch] = True
    probability[batch] = 1.0
    ids = np.flatnonzero(chosen)
    return Sample(ids, np.log(probability[ids]).astype(np.float32))
