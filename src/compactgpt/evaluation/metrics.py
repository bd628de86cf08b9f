"""Turn summed nats and counts into the numbers that people quote. Sums first, then one division.

Definitions follow EleutherAI's lm-evaluation-harness (word, byte and token perplexity are different things)
and nanochat's loss_eval.py (bits per byte from summed nats and summed bytes).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds that hold it with the stated confidence."""

    value: float
    low: float
    high: float

    def map(self, increasing: Callable[[float], float]) -> "Interval":
        """Return the interval of an increasing function of the estimate, which moves percentiles with it."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))


def perplexity(nats_per_token: float) -> float:
    """Return exp of the mean cross-entropy in nats per token: the effective number of choices."""
    return math.exp(nats_per_token)


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Return nats / (ln 2 x bytes), comparable across tokenizers (Gao et al. 2020, The Pile, section 3.1)."""
    return total_nats / (math.log(2) * total_bytes)


def wilson(successes: int, trials: int) -> Interval:
    """Return the share of successes with its 95 % score interval, sound for few trials and near 0 and 1.

    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Rounding could put a bound on the wrong side of the estimate.
    return Interval(share, min(share, (centre - spread) / scale), max(share, (centre + spread) / scale))


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided exact p-value that two models are right equally often (McNemar 1947).

    Takes the number of items that only the first, and only the second model got right: if the models are
    equally good, these are the flips of a fair coin. Items on which they agree carry no information.
    """
    flips = only_one + only_other
    tail = sum(math.comb(flips, k) for k in range(min(only_one, only_other) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def ratio_bootstrap(
    numerator: Array, denominator: Array, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Return sum(numerator) / sum(denominator) with its percentile bootstrap interval.

    Both are sums by document, (documents,), such as nats and tokens. Documents are resampled, since the
    tokens of one document are not independent (Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: no documents, arrays of different length, or a denominator that is not positive.
    """
    if numerator.shape != denominator.shape or numerator.ndim != 1 or not len(numerator):
        raise ValueError(f"need two equal, non-empty vectors, got {numerator.shape} and {denominator.shape}")
    if denominator.min() <= 0:
        raise ValueError(f"every denominator must be positive, found {denominator.min()}")
    generator = np.random.Generator(np.random.PCG64(seed))
    n = len(numerator)
    chunk = max(1, 4_000_000 // n)  # resamples at once, so that memory stays bounded
    ratios = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, n, (min(chunk, resamples - start), n))  # (chunk, documents)
        ratios.append(numerator[drawn].sum(1) / denominator[drawn].sum(1))  # (chunk,)
    low, high = np.quantile(np.concatenate(ratios), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def perplexity_ratio(
    nats: Array, other_nats: Array, tokens: Array, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Return the perplexity of a model over that of another, with a paired bootstrap interval.

    All three are sums over the same documents in the same order, (documents,). The ratio is exp of the
    difference of the two losses. Each resample draws the same documents for both models, which cancels how
    difficult the documents are.

    Raises:
        ValueError: see `ratio_bootstrap`.
    """
    if nats.shape != other_nats.shape:
        raise ValueError(f"need the same documents, got {nats.shape} and {other_nats.shape}")
    difference = ratio_bootstrap(
        nats - other_nats, tokens, resamples=resamples, seed=seed, confidence=confidence
    )
    return difference.map(math.exp)
