"""Sampled softmax for training: draw the tokens of a step's softmax, and the correction of each logit.

The full softmax needs Z, the sum of exp(z_j) over all tokens j. The sampled softmax estimates Z. Token j is
in a step's sample with a known probability pi_j, independently of other tokens. The sum of exp(z_j) / pi_j
over the sample is an unbiased estimate of Z (Horvitz and Thompson 1952). So training adds -log(pi_j) to the
logit of token j, and then computes the usual cross-entropy (Jean et al. 2015, Bengio and Senecal 2008).
Frequent tokens and all tokens of the step's batch are always in the sample (pi = 1), so the logit of a target
needs no correction.

Bias: the logarithm of the estimate is too low by about Var / (2 Z^2), where Var is the estimate's variance.
The bias of the gradient has the same order, 1 / sample size (Bengio and Senecal 2008, section III). Both
biases are zero if every pi is 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SMOOTHING = 1.0  # added to each count, so that a token that the split does not contain is sampled, too
COUNTED_AT_ONCE = 1 << 24  # tokens; limits memory, since np.bincount converts its input to int64
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The sample of one step: the tokens of its softmax."""

    ids: Ints  # (K,) ascending
    log_inclusion: npt.NDArray[np.float32]  # (K,) log of each token's probability of being in the sample

    def positions(self, tokens: Ints) -> Ints:
        """Return the position in `ids` of each token; every token must be in the sample. Any shape."""
        return np.searchsorted(self.ids, tokens)


def token_counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> Ints:
    """Return how often each token occurs in a split, in bounded memory. (tokens,) -> (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def inclusion_probabilities(counts: Ints, size: int, power: float) -> Floats:
    """Return the probability of each token of being in a sample.

    The probability is min(1, c (count + 1)^power). c is chosen so that a sample has `size` tokens on average.

    Args:
        counts: how often each token occurs in the training split. (V,)
        size: the expected number of tokens in a sample; with V or more, every probability is 1.
        power: with 1, tokens are sampled in proportion to their counts; with 0, all tokens are equally
            probable. Mikolov et al. 2013 use 0.75.

    Returns:
        The probability of each token. (V,)
    """
    if size >= len(counts):
        return np.ones(len(counts))
    weights = (counts + SMOOTHING) ** power
    # Probabilities are clipped at 1. For each number k of clipped tokens, compute c from the other tokens.
    ordered = np.sort(weights)[::-1]
    rest = np.cumsum(ordered[::-1])[::-1]  # (V,) sum of the weights from each index on
    k = np.arange(len(ordered))
    scales = (size - k) / rest  # (V,) c for each k
    first = int(np.argmax(scales * ordered <= 1))
    inclusion: Floats = np.minimum(1.0, scales[first] * weights)
    return inclusion


def draw_sample(inclusion: Floats, batch: Ints, *, seed: int, step: int) -> Sample:
    """Draw the sample of a step, and add all tokens of the step's batch.

    The function is pure: all micro-batches and all processes of a step get the same sample.

    Args:
        inclusion: the probability of each token of being in the sample. (V,)
        batch: token ids of the whole step, inputs and targets, of all processes. Any shape.
        seed: the run's seed.
        step: the step's number, counted from 0.
    """
    # `training_batch` uses the same key: another counter makes the sample independent of the batch.
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, 1]))
    chosen = generator.random(len(inclusion)) < inclusion
    probability = inclusion.copy()
    chosen[batch] = True
    probability[batch] = 1.0
    ids = np.flatnonzero(chosen)
    return Sample(ids, np.log(probability[ids]).astype(np.float32))
