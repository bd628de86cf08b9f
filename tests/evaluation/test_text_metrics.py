"""Text statistics: cases worked by hand, and intervals that equal the textbook's."""

import numpy as np
import pytest
import scipy

from compactgpt.evaluation import text_metrics


def test_repetition_and_frequencies_worked_by_hand():
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert text_metrics.distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert text_metrics.distinct_n(texts, 2) == pytest.approx(3 / 5)  # 12 21 12 | 12 23
    once, looped = [1, 2, 3, 4, 5], [1, 2, 1, 2, 1, 2]  # 2 4-grams, both new; 3, of which one repeats
    assert text_metrics.seq_rep_4([once, looped]) == pytest.approx(1 / 5)
    assert text_metrics.seq_rep_4([once, once]) == 0  # each text by itself
    tokens = [token for token in range(1, 101) for _ in range(round(10_000 / token))]
    assert text_metrics.zipf([tokens]) == pytest.approx(1.0, abs=0.01)
    assert text_metrics.distinct_n([[1], []], 2) is None
    assert text_metrics.seq_rep_4([[1, 2, 3]]) is text_metrics.zipf([[3]]) is None


def test_loops_worked_by_hand():
    """No loops: not at the end, only twice, a phrase of one token, no text."""
    for tokens in ([9, 1, 2, 1, 2, 1, 2], [9, 1, 1, 1, 1, 1, 1]):
        assert text_metrics.ends_in_loop(tokens)
    for tokens in ([1, 2, 1, 2, 1, 2, 9], [1, 2, 1, 2], [7, 1, 1, 1], []):
        assert not text_metrics.ends_in_loop(tokens)


def test_intervals_are_students_and_shares_stay_within_0_and_1():
    generator = np.random.default_rng(2)
    texts = [generator.integers(0, 9, length).tolist() for length in (5, 9, 17, 30, 8, 6, 7)]
    found = text_metrics.statistics([*texts, list(range(100, 140))], None)
    lengths = np.array([*map(len, texts), 40])
    expected = scipy.stats.t.ppf(0.975, 7) * lengths.std(ddof=1) / 8**0.5  # the textbook's, of a mean
    assert found["tokens"]["high"] - lengths.mean() == pytest.approx(expected)
    assert found["distinct_3"]["high"] == 1.0 > found["distinct_3"]["value"]
    looped = text_metrics.statistics([[1, 2] * 20, *texts], None)
    assert 0.0 == looped["seq_rep_4"]["low"] < looped["seq_rep_4"]["value"]


def test_statistics_of_text_that_was_cut_have_no_end():
    found = text_metrics.statistics([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], None)
    assert "ended" not in found
    assert found["tokens"] == {"value": 5.0, "low": 5.0, "high": 5.0}
    assert text_metrics.statistics([[1, 2], []], [False, True])["ended"]["value"] == 0.5
    assert text_metrics.statistics([[], []], [True, True])["distinct_1"] is None
