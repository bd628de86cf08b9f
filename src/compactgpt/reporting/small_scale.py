"""Check with small training runs whether effects have the direction that the note claims.

The losses of these training runs are in results/small-scale.json.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.storage import read_json
from compactgpt.evaluation.metrics import Interval, perplexity, perplexity_ratio, ratio_interval, t_quantile
from compactgpt.evaluation.text_metrics import distinct_n, seq_rep_4
from compactgpt.experiments import CONF, Comparison, Expected, TextFigure, find_experiment
from compactgpt.forecast.sweep import Sweep, read_sweep

NAME = "small-scale"
# Text metric -> function of a generated sample. The function returns None if the text is too short.
FIGURES: dict[TextFigure, Callable[[Mapping[str, Any]], float | None]] = {
    "seq_rep_4": lambda sample: seq_rep_4([_numbered_words(sample["text"])]),
    "distinct_2": lambda sample: distinct_n([_numbered_words(sample["text"])], 2),
    "tokens": lambda sample: float(sample["tokens"]),
}


def find_directions(root: Path) -> list[dict[str, Any]]:
    """Compare training runs and generated texts, and return a dict for each claim of each comparison.

    The key `outcome` is `same way` (the direction that the claim says), `other way` or `no effect found`.
    A comparison is left out if a run diverged, so that the ratio or a limit is infinite.
    Returns [] if the sweep `small-scale` or the sweep `seeds` is missing, or if the two sweeps have different
    settings or val documents.
    """
    small, seeds = (read_sweep(root / "results" / f"{name}.json") for name in (NAME, "seeds"))
    if not small or not seeds or small.documents != seeds.documents or small.settings != seeds.settings:
        return []
    experiment = find_experiment(NAME, root / CONF)
    found: list[dict[str, Any]] = []
    for comparison in experiment.comparisons:
        found += _compare_runs(comparison, small, seeds)
    for texts in experiment.texts:
        pairs = _read_texts(root / "reports", texts.baseline)
        if interval := text_difference(pairs, texts.figure):
            found += _outcomes(texts, interval, (1, 1))
    return found


def _compare_runs(comparison: Comparison, small: Sweep, seeds: Sweep) -> Iterator[dict[str, Any]]:
    runs = [*small.runs, *seeds.runs]
    ours = [run.nats for run in runs if run.group == comparison.ours]
    theirs = [run.nats for run in runs if run.group == comparison.theirs]
    if not ours or not theirs or small.documents is None:
        return
    tokens = np.array(small.documents.tokens, float)  # (documents,)
    scored = tokens > 0
    if comparison.source:
        scored &= np.array(small.documents.sources) == comparison.source
    tokens = tokens[scored]
    groups = (ours, theirs, [run.nats for run in seeds.runs])
    ours_nats, theirs_nats, seed_nats = (np.array(nats)[:, scored] for nats in groups)  # (runs, documents)
    by_document = perplexity_ratio(ours_nats.mean(0), theirs_nats.mean(0), tokens)
    between_seeds = seed_margin(seed_nats.sum(1) / tokens.sum(), len(ours), len(theirs))
    if by_document.low == 0 or not by_document.as_report():  # a run diverged: the ratio is 0 or infinite
        return
    ratio = widen(by_document, between_seeds)
    if ratio.as_report():  # None if the upper limit is infinite, because a run of `seeds` diverged
        yield from _outcomes(comparison, ratio, (len(ours), len(theirs)))


def seed_margin(losses: Any, our_runs: int, their_runs: int) -> float:
    """Return half the width of the 95 % interval of a difference between two mean losses.

    One mean is over `our_runs` training runs, the other over `their_runs`. The standard deviation of a single
    loss is calculated from `losses`, (runs,). These are losses of runs that differ only in their seed.
    """
    deviation = float(np.std(losses, ddof=1))
    return t_quantile(0.975, len(losses) - 1) * deviation * math.sqrt(1 / our_runs + 1 / their_runs)


def widen(interval: Interval, margin: float) -> Interval:
    """Return `interval`, the 95 % interval of a ratio, widened by a second, independent error.

    With the second error alone, the 95 % interval of log(ratio) would be log(ratio) +/- `margin`.
    """
    centre = math.log(interval.value)
    below, above = centre - math.log(interval.low), math.log(interval.high) - centre
    low, high = centre - math.hypot(below, margin), centre + math.hypot(above, margin)
    return Interval(interval.value, perplexity(low), perplexity(high))


def _read_texts(reports: Path, baseline: str) -> list[tuple[Any, Any]]:
    """Return pairs of greedily generated samples: (compact model's, baseline's).

    Both samples of a pair continue the beginning of the same val document.
    """
    paths = (reports / "samples.json", reports / "baseline" / f"{baseline}.json")
    if not all(path.exists() for path in paths):
        return []
    ours, theirs = read_json(paths[0])["samples"], read_json(paths[1])["text"]["samples"]
    by_document = {sample["document"]: sample["greedy"] for sample in theirs if sample["document"]}
    return [
        (sample["greedy"], by_document[sample["document"]])
        for sample in ours
        if sample["document"] in by_document
    ]


def text_difference(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], figure: TextFigure
) -> Interval | None:
    """Return the mean difference of a text metric, with a 95 % t-interval.

    For each pair, the metric of the second text is subtracted from the metric of the first text. `figure` is
    the name of the metric. Returns None if the metric is defined for fewer than two pairs.
    """
    values = [[FIGURES[figure](sample) for sample in pair] for pair in pairs]
    differences = [ours - theirs for ours, theirs in values if ours is not None and theirs is not None]
    if len(differences) < 2:
        return None
    # `ratio_interval` divides two sums. If each denominator is 1, the result is the mean of `differences`.
    return ratio_interval(np.array(differences), np.ones(len(differences)))


def _numbered_words(text: str) -> list[int]:
    """Return one number per word or punctuation mark. Equal words have equal numbers."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return [words.index(word) for word in words]


def _outcomes(expected: Expected, interval: Interval, runs: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yield a dict for each claim of `expected`. `outcome` says whether `interval` agrees with the claim.

    The claim says that a ratio is above or below 1, or that a difference is above or below 0. `runs` has
    the numbers of training runs in the two compared groups.
    """
    is_ratio = isinstance(expected, Comparison)
    neutral = 1 if is_ratio else 0
    outcome = "no effect found"
    if interval.low > neutral or interval.high < neutral:
        is_above = interval.low > neutral
        outcome = "same way" if is_above == (expected.expected == "above") else "other way"
    for claim in expected.claims:
        yield {
            "claim": claim,
            "outcome": outcome,
            "quantity": expected.quantity,
            "unit": "ratio" if is_ratio else "difference",
            "runs": runs,
            "otherwise": "" if outcome == "same way" else expected.otherwise,
            **asdict(interval),
        }
