"""From summed nats to the numbers that people quote. Sums first, then one division.

Definitions follow EleutherAI's lm-evaluation-harness (word, byte and token perplexity are different
things) and nanochat's loss_eval.py (bits per byte from summed nats and summed bytes).
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
        """The interval of an increasing function of the estimate: percentiles follow such a function."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))


def perplexity(nats_per_token: float) -> float:
    """exp of the mean cross-entropy in nats per token: the effective number of choices."""
    return math.exp(nats_per_token)


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Bits that the model needs for one byte of UTF-8 text; comparable across tokenizers.

    nats / (ln 2 x bytes), Gao et al. 2020, The Pile, section 3.1.
    """
    return total_nats / (math.log(2) * total_bytes)


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes with its 95 % score interval, sound for small numbers and near 0 and 1.

    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # the bounds that rounding would put beyond the estimate
    return Interval(share, min(share, (centre - spread) / scale), max(share, (centre + spread) / scale))


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p-value that two models are right equally often on the same items.

    Args:
        only_one: items that the first model alone got right.
        only_other: items that the second model alone got right.

    McNemar 1947; the items on which the two agree tell nothing, the others are a fair coin's flips.
    """
    flips = only_one + only_other
    tail = sum(math.comb(flips, k) for k in range(min(only_one, only_other) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def ratio_bootstrap(
    numerator: Array, denominator: Array, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of sum(numerator) / sum(denominator), resampling documents.

    The document is the unit: tokens of one document are not independent. Efron and Tibshirani,
    An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        numerator: one sum a document, such as nats. (documents,)
        denominator: one sum a document, such as tokens. (documents,)
        resamples: number of bootstrap samples.
        seed: of the resampling.
        confidence: share of the bootstrap distribution between the bounds.

    Raises:
        ValueError: no documents, arrays of different length, or a denominator that is not positive.
    """
    if numerator.shape != denominator.shape or numerator.ndim != 1 or not len(numerator):
        raise ValueError(f"need two equal, non-empty vectors, got {numerator.shape} and {denominator.shape}")
    if denominator.min() <= 0:
        raise ValueError(f"every denominator must be positive, found {denominator.min()}")
    samples = _resampled_ratios(numerator, denominator, resamples, seed)
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def perplexity_ratio(
    nats: Array, other_nats: Array, tokens: Array, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Perplexity of a model over that of another on the same documents, with a paired interval.

    The ratio is exp of the difference of the two losses, so its interval is exp of that difference's; each
    resample draws the same documents for both models, which takes out how hard the documents are.

    Args:
        nats: of the model, one sum a document. (documents,)
        other_nats: of the other model, in the same order. (documents,)
        tokens: scored, counted the same way for both. (documents,)
        resamples: number of bootstrap samples.
        seed: of the resampling.
        confidence: share of the bootstrap distribution between the bounds.

    Raises:
        ValueError: see `ratio_bootstrap`.
    """
    if nats.shape != other_nats.shape:
        raise ValueError(f"need the same documents, got {nats.shape} and {other_nats.shape}")
    difference = ratio_bootstrap(
        nats - other_nats, tokens, resamples=resamples, seed=seed, confidence=confidence
    )
    return difference.map(math.exp)


def _resampled_ratios(numerator: Array, denominator: Array, resamples: int, seed: int) -> Array:
    """Ratio of sums for each resample; chunked so that memory stays bounded. (resamples,)"""
    generator = np.random.Generator(np.random.PCG64(seed))
    n = len(numerator)
    chunk = max(1, 4_000_000 // n)
    ratios = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, n, (min(chunk, resamples - start), n))
        ratios.append(numerator[drawn].sum(1) / denominator[drawn].sum(1))
    return np.concatenate(ratios)
