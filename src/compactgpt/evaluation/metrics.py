"""Compute perplexity, bits per byte, confidence intervals and tests.

A mean is a sum over all documents, divided by their number of tokens, words or bytes.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the limits of its confidence interval."""

    value: float
    low: float
    high: float

    def map(self, increasing: Callable[[float], float]) -> "Interval":
        """Apply an increasing function to the estimate and its limits."""
        return Interval(increasing(self.value), increasing(self.low), increasing(self.high))

    def as_report(self) -> dict[str, float] | None:
        """Return the interval as a dict, or None if a number is infinite."""
        return asdict(self) if math.isfinite(self.value + self.high) else None


def perplexity(nats_per_token: float) -> float:
    """Return exp(nats per token), as lm-evaluation-harness does; infinite if too large for a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def finite_or_none(value: float) -> float | None:
    """Return the value; None if the value is infinite or NaN, which JSON can't store."""
    return value if math.isfinite(value) else None


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Return nats / (ln 2 x bytes) (Gao et al. 2020, section 3.1)."""
    return total_nats / (math.log(2) * total_bytes)


def wilson(successes: int, trials: int) -> Interval:
    """Return the share of successes with its 95 % Wilson score interval (1927)."""
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Keep the estimate between the limits: rounding could move a limit past the estimate.
    return Interval(share, min(share, (centre - spread) / scale), max(share, (centre + spread) / scale))


def t_quantile(probability: float, degrees: float) -> float:
    """Return a quantile of Student's t distribution with `degrees` degrees of freedom."""
    from scipy.special import stdtrit  # imported here: scipy would delay stages that need no interval

    return float(stdtrit(degrees, probability))


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the p-value of McNemar's exact two-sided test (1947). Null hypothesis: equal accuracies.

    The arguments count the items that only one of the two models answers correctly.
    """
    fewer, more = sorted((only_one, only_other))
    return min(1.0, 2 * mcnemar_one_sided(more, fewer))


def mcnemar_one_sided(lost: int, won: int) -> float:
    """Return the p-value of McNemar's exact one-sided test (1947). Null hypothesis: no fall in accuracy.

    `lost` is the number of items that only the old model answers correctly. `won` is the number of items
    that only the new model answers correctly.
    """
    changed = lost + won
    return float(sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed)


def ratio_interval(numerator: Array, denominator: Array, *, confidence: float = 0.95) -> Interval:
    """Return sum(numerator) / sum(denominator), both (documents,), with its jackknife interval.

    For one document, the limits are equal to the ratio.
    """
    # A percentile bootstrap misses the true ratio more often than a jackknife (benchmarks/intervals.py).
    n, total, size = len(numerator), numerator.sum(), denominator.sum()
    ratio = float(total / size)
    if n == 1:
        return Interval(ratio, ratio, ratio)
    without_one = (total - numerator) / (size - denominator)  # (documents,)
    # Standard error of the jackknife: population standard deviation of `without_one` x sqrt(n - 1).
    reach = t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(n - 1) * float(without_one.std())
    return Interval(ratio, ratio - reach, ratio + reach)


def perplexity_ratio(nats: Array, other_nats: Array, tokens: Array) -> Interval:
    """Return the first model's perplexity divided by the second model's, with a 95 % interval.

    All arrays are (documents,). The interval is paired: the two losses of each document are subtracted.
    """
    return ratio_interval(nats - other_nats, tokens).map(perplexity)
