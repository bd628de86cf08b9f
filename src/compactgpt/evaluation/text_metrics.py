"""Compute statistics of generated text: variety, repetition, loops, token frequencies and length.

The caller truncates all texts to the same number of GPT-2 tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from statistics import linear_regression
from typing import Any

import numpy as np

from compactgpt.evaluation.metrics import Interval, t_quantile, wilson

Tokens = Sequence[int]
Figure = Callable[[Sequence[Tokens]], float | None]
SOURCES = {
    "distinct_n": "distinct n-grams / n-grams (Li et al. 2016, A Diversity-Promoting Objective Function)",
    "seq_rep_4": "share of all 4-grams that occurred earlier in the same continuation (Welleck et al. 2020, "
    "Neural Text Generation with Unlikelihood Training; that paper averages the shares of the continuations)",
    "loop_rate": "share of continuations that end with a phrase of at least two tokens three times in a row "
    "(Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, appendix on repetition)",
    "zipf": "minus the slope of the least-squares line through the points (log(rank), log(frequency)) of the "
    "tokens (Holtzman et al. 2020)",
    "tokens": "mean number of tokens of a continuation, which stops at max_new_tokens",
    "ended": "share of continuations that ended with end-of-text before max_new_tokens",
}


def distinct_n(texts: Sequence[Tokens], n: int) -> float | None:
    """Return distinct n-grams / all n-grams of the texts, or None if the texts have no n-grams."""
    found = list(chain.from_iterable(_ngrams(text, n) for text in texts))
    return len(set(found)) / len(found) if found else None


def seq_rep_4(texts: Sequence[Tokens]) -> float | None:
    """Return the share of 4-grams that occur earlier in the same text, or None if there are no 4-grams."""
    found = [_ngrams(text, 4) for text in texts]
    total = sum(map(len, found))
    return 1 - sum(len(set(grams)) for grams in found) / total if total else None


def _ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def ends_in_loop(tokens: Tokens) -> bool:
    """Return whether a text ends with the same phrase, of two or more tokens, three times in a row."""
    text = list(tokens)
    return any(text[-length:] * 3 == text[-length * 3 :] for length in range(2, len(text) // 3 + 1))


def zipf(texts: Sequence[Tokens]) -> float | None:
    """Return minus the slope of log(frequency) over log(rank) of the tokens (Zipf's law).

    Returns None if the texts have fewer than two different tokens.
    """
    counts = sorted(Counter(chain.from_iterable(texts)).values(), reverse=True)
    if len(counts) < 2:
        return None
    # Use math, not numpy: the last digit of numpy's logarithms and fits depends on the processor.
    ranks = [math.log(rank) for rank in range(1, len(counts) + 1)]  # the most frequent token has rank 1
    return -linear_regression(ranks, [math.log(count) for count in counts]).slope


def jackknife(texts: Sequence[Tokens], figure: Figure, highest: float = math.inf) -> Interval | None:
    """Return `figure(texts)` with its 95 % jackknife interval (Efron and Stein 1981).

    Cuts the interval to the range from 0 to `highest`. Returns None for fewer than two texts. Also returns
    None if `figure` returns None for `texts`, or for the texts that remain after one text is left out.
    """
    value, n = figure(texts), len(texts)
    # Leave out each text once. A bootstrap sample is not suitable: it can contain a text several times, and
    # the copies would count as repetition.
    without_one = [figure([*texts[:left_out], *texts[left_out + 1 :]]) for left_out in range(n)]
    known = [each for each in without_one if each is not None]
    if value is None or len(known) < n or n < 2:  # no estimate, or no variance
        return None
    squares = float(np.sum((np.array(known) - np.mean(known)) ** 2))
    reach = t_quantile(0.975, n - 1) * math.sqrt((n - 1) / n * squares)
    return Interval(value, max(0.0, value - reach), min(highest, value + reach))


def statistics(texts: Sequence[Tokens], ended: Sequence[bool] | None) -> dict[str, Any]:
    """Return all statistics of texts, each with its interval.

    `ended` has True for each text that reached end-of-text. It is None for human text.
    """
    shares: dict[str, Figure] = {f"distinct_{n}": partial(distinct_n, n=n) for n in (1, 2, 3)}
    shares["seq_rep_4"] = seq_rep_4
    found = {name: jackknife(texts, figure, highest=1.0) for name, figure in shares.items()}
    found["zipf"] = jackknife(texts, zipf)
    found["tokens"] = jackknife(texts, lambda some: sum(map(len, some)) / len(some) if some else None)
    # `loop_rate` and `ended` are shares of texts, so they have Wilson intervals.
    found["loop_rate"] = wilson(sum(map(ends_in_loop, texts)), len(texts))
    if ended is not None:
        found["ended"] = wilson(sum(ended), len(ended))
    return {name: asdict(interval) if interval else None for name, interval in found.items()}
