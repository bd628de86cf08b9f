"""Say what small runs show about the note's claims: the direction of each effect, at the demo's size.

The runs are those of results/small-scale.json. conf/experiments/small-scale.yaml says what the claims lead to
expect. No verdict about a claim depends on these results. An interval covers two kinds of chance: the choice
of val documents (paired bootstrap), and the seed, whose standard deviation comes from results/seeds.json.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compactgpt.common.sections import Section
from compactgpt.common.storage import read_json
from compactgpt.config import Likelihood
from compactgpt.evaluation.metrics import Interval, perplexity_ratio
from compactgpt.evaluation.text_metrics import Figure, distinct_n, seq_rep_4
from compactgpt.experiments import CONF, Comparison, Expected, TextComparison, find_experiment
from compactgpt.forecast.sweep import Sweep, SweepRun, read_sweep

NAME = "small-scale"
Outcome = Literal["same way", "other way", "no effect found"]
FIGURES: dict[str, Figure] = {"seq_rep_4": seq_rep_4, "distinct_2": lambda texts: distinct_n(texts, 2)}


class Direction(Section):
    """What the small runs show about one claim."""

    claim: str  # id in claims.yaml
    outcome: Outcome
    quantity: str
    value: float
    low: float  # 95 % interval
    high: float
    runs: tuple[int, int]  # number of runs, each with another seed, above and below the fraction line
    text: str  # one sentence in English with all of this


def directions(root: Path, likelihood: Likelihood) -> tuple[Direction, ...]:
    """Return what the small runs show, in the order of conf/experiments/small-scale.yaml.

    A comparison is left out if its runs are not recorded; all are if the two files of results are missing, or
    differ in recipe or val documents.

    Args:
        root: the project's folder, with results/, reports/ and conf/.
        likelihood: section `evaluation.likelihood`, for the bootstrap.
    """
    small, seeds = (read_sweep(root / "results" / f"{name}.json") for name in (NAME, "seeds"))
    if not small or not seeds or small.documents != seeds.documents or small.settings != seeds.settings:
        return ()
    experiment = find_experiment(NAME, root / CONF)
    found: list[Direction] = []
    for comparison in experiment.comparisons:
        found += _compare_runs(comparison, small, seeds, likelihood)
    for texts in experiment.texts:
        found += _compare_texts(texts, root / "reports")
    return tuple(found)


def _compare_runs(
    comparison: Comparison, small: Sweep, seeds: Sweep, likelihood: Likelihood
) -> Iterator[Direction]:
    runs = [*small.runs, *seeds.runs]
    ours, theirs = (
        [run for run in runs if run.group == group] for group in (comparison.ours, comparison.theirs)
    )
    if not ours or not theirs or small.documents is None:
        return
    tokens = np.array(small.documents.tokens, float)  # (documents,)
    scored = tokens > 0
    if comparison.source:
        scored &= np.array(small.documents.sources) == comparison.source
    tokens = tokens[scored]
    ours_nats, theirs_nats, seed_nats = (_nats(group, scored) for group in (ours, theirs, seeds.runs))
    by_document = perplexity_ratio(
        ours_nats.mean(0),
        theirs_nats.mean(0),
        tokens,
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )
    between_seeds = seed_margin(seed_nats.sum(1) / tokens.sum(), len(ours), len(theirs))
    interval = widen(by_document, between_seeds)
    yield from _directions(comparison, interval, (len(ours), len(theirs)))


def _nats(runs: Sequence[SweepRun], scored: Any) -> Any:
    """Return the losses of runs by document. (runs, documents)"""
    return np.array([run.nats for run in runs])[:, scored]


def seed_margin(losses: Any, ours: int, theirs: int) -> float:
    """Return half the width of the 95 % interval of a difference of mean losses, by the seed alone.

    Args:
        losses: losses of runs that differ in their seed only; they give the standard deviation. (runs,)
        ours: number of runs of the first mean.
        theirs: number of runs of the second mean.
    """
    from scipy.stats import t

    deviation = float(np.std(losses, ddof=1))
    return float(t.ppf(0.975, len(losses) - 1)) * deviation * math.sqrt(1 / ours + 1 / theirs)


def widen(interval: Interval, margin: float) -> Interval:
    """Return the interval of a ratio with another, independent error: `margin` of the ratio's logarithm.

    The two half widths are added as the lengths of two orthogonal vectors.
    """
    centre = math.log(interval.value)
    below, above = centre - math.log(interval.low), math.log(interval.high) - centre
    low, high = centre - math.hypot(below, margin), centre + math.hypot(above, margin)
    return Interval(interval.value, math.exp(low), math.exp(high))


def _compare_texts(comparison: TextComparison, reports: Path) -> Iterator[Direction]:
    """Compare the texts that our model and a baseline generated for the same prompts."""
    samples = reports / "samples.json"
    baseline = reports / "baseline" / f"{comparison.baseline}.json"
    if not samples.exists() or not baseline.exists():
        return
    ours, theirs = (
        {sample["document"]: sample["greedy"] for sample in report["samples"] if sample["document"]}
        for report in (read_json(samples), read_json(baseline)["text"])
    )
    pairs = [(ours[document], theirs[document]) for document in ours if document in theirs]
    if interval := text_ratio(pairs, comparison.figure):
        yield from _directions(comparison, interval, (1, 1))


def text_ratio(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], figure: str) -> Interval | None:
    """Return a figure of the first texts over that of the second ones, with its 95 % interval.

    The interval leaves out one prompt at a time (jackknife of the logarithm, with Student's t). It does not
    include the noise between seeds.

    Args:
        pairs: the two continuations of each prompt, with their `text` and their number of `tokens`.
        figure: `tokens`, the mean length in the model's own tokens; or a statistic of `FIGURES`, of words.

    Returns:
        None if there are fewer than two prompts, or the figure is 0 or undefined for some of them.
    """
    from scipy.stats import t

    n = len(pairs)
    kept = [pairs, *([*pairs[:left_out], *pairs[left_out + 1 :]] for left_out in range(n))]
    sides = [[_figure([pair[side] for pair in some], figure) for side in (0, 1)] for some in kept]
    if n < 2 or not all(value for side in sides for value in side):
        return None
    centre, *without_one = np.log([ours / theirs for ours, theirs in sides])
    error = math.sqrt((n - 1) / n * float(np.sum((without_one - np.mean(without_one)) ** 2)))
    margin = float(t.ppf(0.975, n - 1)) * error
    return Interval(*(math.exp(centre + side * margin) for side in (0, -1, 1)))


def _figure(texts: Sequence[Mapping[str, Any]], figure: str) -> float:
    if figure == "tokens":
        return float(np.mean([text["tokens"] for text in texts])) if texts else 0.0
    numbers: dict[str, int] = {}  # of each word and each punctuation mark
    words = [re.findall(r"\w+|[^\w\s]", text["text"]) for text in texts]
    return (
        FIGURES[figure]([[numbers.setdefault(word, len(numbers)) for word in text] for text in words]) or 0.0
    )


def _directions(expected: Expected, interval: Interval, runs: tuple[int, int]) -> Iterator[Direction]:
    """Yield the outcome for each claim of a comparison."""
    outcome: Outcome = "no effect found"
    if interval.low > 1 or interval.high < 1:
        outcome = "same way" if (interval.low > 1) == (expected.expected == "above") else "other way"
    found = f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
    number = "one run each" if runs == (1, 1) else f"{runs[0]} and {runs[1]} runs"
    says = outcome if outcome == "no effect found" else f"points the {outcome}"
    text = f"at demo scale: {says}: {expected.quantity} is {found}, {number}"
    if outcome == "no effect found":
        text += f"; {expected.no_effect}"
    for claim in expected.claims:
        yield Direction(
            claim=claim, outcome=outcome, quantity=expected.quantity, value=interval.value,
            low=interval.low, high=interval.high, runs=runs, text=text,
        )  # fmt: skip
