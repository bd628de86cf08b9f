"""Metrics: values worked by hand, and intervals and tests that equal those of scipy."""

import math

import numpy as np
import pytest
import scipy

from compactgpt.evaluation.metrics import (
    Interval,
    bits_per_byte,
    mcnemar,
    perplexity,
    perplexity_ratio,
    ratio_interval,
    wilson,
)


def test_values_worked_by_hand():
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(710) == math.inf
    assert bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)  # eight coin flips a byte
    found = ratio_interval(np.array([1.0, 30.0]), np.array([1.0, 10.0]))
    assert found.value == pytest.approx(31 / 11)  # not the mean of 1 and 3


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_is_students_with_the_jackknifes_standard_error(confidence):
    nats, tokens = np.array([2.0, 9.0, 4.0, 7.5]), np.array([1.0, 3.0, 4.0, 2.0])
    without = [np.delete(nats, i).sum() / np.delete(tokens, i).sum() for i in range(4)]
    error = math.sqrt(3 / 4 * sum((one - np.mean(without)) ** 2 for one in without))
    reach = scipy.stats.t.ppf((1 + confidence) / 2, 3) * error
    found = ratio_interval(nats, tokens, confidence=confidence)
    assert found == Interval(2.25, pytest.approx(2.25 - reach), pytest.approx(2.25 + reach))
    assert ratio_interval(nats[:1], tokens[:1]) == Interval(2.0, 2.0, 2.0)  # one document has no variance


def test_the_paired_ratio_finds_what_two_separate_intervals_hide():
    """A model 0.02 nats better everywhere: the paired interval excludes 1, the plain ones overlap."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(20, 400, 60).astype(float)
    worse = tokens * generator.normal(3.0, 0.5, 60)
    better = worse - tokens * generator.normal(0.02, 0.01, 60)
    found = perplexity_ratio(worse, better, tokens)
    assert found.value == pytest.approx(math.exp((worse.sum() - better.sum()) / tokens.sum()))
    assert 1 < found.low < found.value < found.high < 1.04
    one, two = (ratio_interval(nats, tokens) for nats in (worse, better))
    assert one.low < two.high


@pytest.mark.parametrize(("one", "other"), [(0, 10), (7, 3), (12, 7), (1678, 3475), (0, 0)])
def test_wilson_and_mcnemar_are_scipys(one, other):
    total = one + other
    if total:
        found = wilson(one, total)
        expected = scipy.stats.binomtest(one, total).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.low <= found.value <= found.high
    p_value = scipy.stats.binomtest(one, total, 0.5).pvalue if total else 1.0
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(p_value, rel=1e-9)
