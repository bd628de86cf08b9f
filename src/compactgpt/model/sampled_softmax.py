"""Sampled softmax for training: each step uses a random sample of the vocabulary.

The sample contains token j with a known probability pi_j. The sum of exp(z_j) / pi_j over the sample is an
unbiased estimate of Z, the sum of exp(z_j) over all tokens (Horvitz and Thompson 1952). So training adds
-log(pi_j) to logit z_j (Jean et al. 2015, Bengio and Senecal 2008). On average, the log of the estimate is
too low by about Var / (2 Z^2), where Var is the estimate's variance.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SMOOTHING = 1.0  # added to each count: tokens that the train split lacks are sampled, too
# Number of tokens in one call of np.bincount, which copies them as int64.
COUNTED_AT_ONCE = 1 << 24
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The tokens over which one step computes the softmax."""

    ids: Ints  # (K,) token ids, ascending
    log_inclusion: npt.NDArray[np.float32]  # (K,) log of the probability that the sample has the token

    def positions(self, tokens: Ints) -> Ints:
        """Return the index in `ids` of each token, in the shape of `tokens`.

        Every token must be in the sample.
        """
        return np.searchsorted(self.ids, tokens)


def token_counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> Ints:
    """Return how often each token id occurs in `tokens`. (tokens,) -> (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def inclusion_probabilities(counts: Ints, size: int, power: float) -> Floats:
    """Return the probability that a sample of the vocabulary has each token. (V,) -> (V,).

    `counts` is how often each token occurs in the train split. A probability is min(1, c (count + 1)^power).
    A sample has `size` tokens on average, which fixes c. Mikolov et al. 2013 use the power 0.75.
    """
    if size >= len(counts):
        return np.ones(len(counts))
    weights = (counts + SMOOTHING) ** power
    # Suppose that the k largest weights have probability 1. For each k, compute the c with which the
    # probabilities of the other tokens add up to size - k.
    ordered = np.sort(weights)[::-1]
    rest = np.cumsum(ordered[::-1])[::-1]  # (V,) sum of the weights from each index on
    k = np.arange(len(ordered))
    scales = (size - k) / rest  # (V,) c for each k
    first = int(np.argmax(scales * ordered <= 1))
    inclusion: Floats = np.minimum(1.0, scales[first] * weights)
    return inclusion


def draw_sample(inclusion: Floats, batch: Ints, *, seed: int, step: int) -> Sample:
    """Draw a sample of the vocabulary for `step`, counted from 0.

    `inclusion`, (V,), has the probability of each token. The sample also contains every token of `batch`, the
    inputs and targets of all processes, with probability 1.
    """
    # Another counter than in `training_batch` makes the sample independent of the batch.
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, 1]))
    chosen = generator.random(len(inclusion)) < inclusion
    probability = inclusion.copy()
    chosen[batch] = True
    probability[batch] = 1.0
    ids = np.flatnonzero(chosen)
    return Sample(ids, np.log(probability[ids]).astype(np.float32))
