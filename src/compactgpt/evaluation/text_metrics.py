"""What continuations look like in numbers: variety, repetition, loops, word frequencies, length.

Each figure is of all continuations of one way of writing together: sums first, then one division. The
unit is the split's token (GPT-2's), whatever model wrote, so that models with other tokenizers and human
text compare; texts must be cut to one length before. Intervals are 95 %: Wilson's for shares of
continuations, else the jackknife's, which leaves one continuation out at a time (Efron and Stein 1981,
The Jackknife Estimate of Variance); a bootstrap would draw a continuation twice and find it repetitive.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np

from compactgpt.evaluation.metrics import Interval, wilson

Tokens = Sequence[int]
SOURCES = {
    "distinct_n": "distinct n-grams / n-grams (Li et al. 2016, A Diversity-Promoting Objective Function)",
    "seq_rep_4": "1 - distinct 4-grams of a continuation / its 4-grams, summed over continuations first "
    "(Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, which averages)",
    "loop_rate": "share that ends in a phrase of two tokens or more three times in a row (Holtzman et al. "
    "2020, The Curious Case of Neural Text Degeneration, appendix on repetition)",
    "zipf": "slope of log frequency over log rank, negated, by least squares (Holtzman et al. 2020)",
    "tokens": "mean length, cut at the limit",
    "ended": "share that reached end-of-text before the limit",
}
_LEAST_LOOP, _TIMES = 2, 3


def ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    """All n-grams of a text, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct_n(texts: Sequence[Tokens], n: int) -> float | None:
    """Distinct n-grams of all texts together over their number; None where there are none."""
    found = list(chain.from_iterable(ngrams(text, n) for text in texts))
    return len(set(found)) / len(found) if found else None


def seq_rep_4(texts: Sequence[Tokens]) -> float | None:
    """Share of 4-grams that their own text had before; None where there are none."""
    found = [ngrams(text, 4) for text in texts]
    total = sum(map(len, found))
    return 1 - sum(len(set(grams)) for grams in found) / total if total else None


def ends_in_a_loop(tokens: Tokens) -> bool:
    """Tell whether a text ends in a phrase of _LEAST_LOOP tokens or more, _TIMES times in a row."""
    text = list(tokens)
    return any(
        text[-size:] * _TIMES == text[-size * _TIMES :]
        for size in range(_LEAST_LOOP, len(text) // _TIMES + 1)
    )


def zipf(texts: Sequence[Tokens]) -> float | None:
    """Zipf coefficient of the tokens' frequencies; None where fewer than two differ."""
    counts = sorted(Counter(chain.from_iterable(texts)).values(), reverse=True)
    if len(counts) < 2:
        return None
    ranks = np.log(np.arange(1, len(counts) + 1))
    return float(-np.polyfit(ranks, np.log(counts), 1)[0])


def jackknife(texts: Sequence[Tokens], figure: Callable[[Sequence[Tokens]], float | None]) -> Interval | None:
    """A figure with its 95 % interval; None where it, or it without one of the texts, does not exist."""
    value, n = figure(texts), len(texts)
    without = [figure([*texts[:place], *texts[place + 1 :]]) for place in range(n)]
    known = [one for one in without if one is not None]
    if value is None or len(known) < n or n < 2:
        return None
    error = math.sqrt((n - 1) / n * float(np.sum((np.array(known) - np.mean(known)) ** 2)))
    return Interval(value, value - 1.96 * error, value + 1.96 * error)


def statistics(texts: Sequence[Tokens], ended: Sequence[bool] | None) -> dict[str, Any]:
    """All figures of the continuations of one way.

    Args:
        texts: ids of the split's tokenizer, one list a continuation, at least one.
        ended: which of them ended by themselves; None for text that was cut.
    """
    figures: dict[str, Callable[[Sequence[Tokens]], float | None]] = {
        "distinct_1": lambda some: distinct_n(some, 1),
        "distinct_2": lambda some: distinct_n(some, 2),
        "distinct_3": lambda some: distinct_n(some, 3),
        "seq_rep_4": seq_rep_4,
        "zipf": zipf,
        "tokens": lambda some: sum(map(len, some)) / len(some) if some else None,
    }
    found = {name: jackknife(texts, figure) for name, figure in figures.items()}
    found["loop_rate"] = wilson(sum(map(ends_in_a_loop, texts)), len(texts))
    if ended is not None:
        found["ended"] = wilson(sum(ended), len(ended))
    return {name: None if interval is None else asdict(interval) for name, interval in found.items()}
