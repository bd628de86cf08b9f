"""A softmax over a sample of the vocabulary, for training: which tokens a step uses, and their weights.

The full softmax needs Z, the sum of exp(z_j) over all tokens j. Here token j is in a step's sample with a
known probability pi_j, independently of the others, and the sum of exp(z_j) / pi_j over the sample estimates
Z without bias (Horvitz and Thompson 1952). So -log(pi_j) is added to a logit, and the rest is the usual
cross-entropy (Jean et al. 2015, Bengio and Senecal 2008). Frequent tokens and those of the step's own batch
are always in the sample (pi = 1), so a target's logit never has a correction.

Bias: the logarithm of the estimate is too low by about Var / (2 Z^2), and the loss's gradient has a bias of
the same order, 1 / sample size (Bengio and Senecal 2008, section III). Both are zero if every pi is 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SMOOTHING = 1.0  # added to each token's count, so that tokens that are not in the split are sampled, too
COUNTED_AT_ONCE = 1 << 24  # tokens; np.bincount converts them to int64
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The tokens of one step's softmax."""

    ids: Ints  # (K,) ascending
    log_inclusion: npt.NDArray[np.float32]  # (K,) log of each token's probability of being in the sample

    def positions(self, tokens: Ints) -> Ints:
        """Replace token ids, all of them in the sample, by their positions in `ids`. Any shape."""
        return np.searchsorted(self.ids, tokens)


def token_counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> Ints:
    """Count each token of a split, in bounded memory. (tokens,) -> (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def inclusion_probabilities(counts: Ints, size: int, power: float) -> Floats:
    """Return min(1, c (count + 1)^power), with c such that the expected sample has `size` tokens.

    Args:
        counts: of each token in the training split. (V,)
        size: expected number of tokens in a sample; V or more makes every probability 1.
        power: 1 samples in proportion to the count, 0 all alike; Mikolov et al. 2013 use 0.75.

    Returns:
        (V,)
    """
    if size >= len(counts):
        return np.ones(len(counts))
    weights = (counts + SMOOTHING) ** power
    # The largest probabilities are cut at 1. If the first k tokens are cut, c follows from the others.
    ordered = np.sort(weights)[::-1]
    rest = np.cumsum(ordered[::-1])[::-1]  # (V,) sum of all weights from this one on
    k = np.arange(len(ordered))
    scales = (size - k) / rest  # (V,) c for each k
    first = int(np.argmax(scales * ordered <= 1))
    inclusion: Floats = np.minimum(1.0, scales[first] * weights)
    return inclusion


def draw_sample(inclusion: Floats, batch: Ints, *, seed: int, step: int) -> Sample:
    """Draw a step's sample and add the tokens of its batch: a pure function of the arguments.

    So all micro-batches and all processes of a step have the same sample.

    Args:
        inclusion: each token's probability. (V,)
        batch: token ids of the whole step, inputs and targets, of all processes. Any shape.
        seed: of the run.
        step: counted from 0.
    """
    # The key of the batch's own generator with another counter: independent of the batch.
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, 1]))
    chosen = generator.random(len(inclusion)) < inclusion
    probability = inclusion.copy()
    chosen[batch] = True
    probability[batch] = 1.0
    ids = np.flatnonzero(chosen)
    return Sample(ids, np.log(probability[ids]).astype(np.float32))
