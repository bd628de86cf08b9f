"""Say what small runs show about the note's claims: the direction of each effect, at the demo's size.

The runs are those of results/small-scale.json. conf/experiments/small-scale.yaml says what the claims lead to
expect. No verdict about a claim depends on these results. An interval covers two kinds of chance: the choice
of val documents (a paired interval), and the seed, whose standard deviation comes from results/seeds.json.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compactgpt.common.sections import Section
from compactgpt.common.storage import read_json
from compactgpt.evaluation.metrics import Interval, perplexity_ratio, ratio_interval, t_quantile
from compactgpt.evaluation.text_metrics import distinct_n, seq_rep_4
from compactgpt.experiments import CONF, Comparison, Expected, TextComparison, TextFigure, find_experiment
from compactgpt.forecast.sweep import Sweep, SweepRun, read_sweep

NAME = "small-scale"
Outcome = Literal["same way", "other way", "no effect found"]
# The figures of one generated text, of words or of the model's own tokens. None: the text is too short.
FIGURES: dict[TextFigure, Callable[[Mapping[str, Any]], float | None]] = {
    "seq_rep_4": lambda sample: seq_rep_4([_numbered_words(sample["text"])]),
    "distinct_2": lambda sample: distinct_n([_numbered_words(sample["text"])], 2),
    "tokens": lambda sample: float(sample["tokens"]),
}


class Direction(Section):
    """The difference that the small runs show for one claim, and whether it points the way the claim says."""

    claim: str  # id in claims.yaml
    outcome: Outcome
    quantity: str
    unit: Literal["ratio", "difference"]
    value: float
    low: float  # 95 % interval
    high: float
    runs: tuple[int, int]  # number of runs, each with another seed, above and below the fraction line
    otherwise: str  # what the outcome means if it is not "same way"; otherwise empty


def directions(root: Path) -> tuple[Direction, ...]:
    """Return what the small runs show, in the order of conf/experiments/small-scale.yaml.

    A comparison is left out if its runs are not recorded; all are if the two files of results are missing, or
    differ in recipe or val documents.

    Args:
        root: the project's folder, with results/, reports/ and conf/.
    """
    small, seeds = (read_sweep(root / "results" / f"{name}.json") for name in (NAME, "seeds"))
    if not small or not seeds or small.documents != seeds.documents or small.settings != seeds.settings:
        return ()
    experiment = find_experiment(NAME, root / CONF)
    found: list[Direction] = []
    for comparison in experiment.comparisons:
        found += _compare_runs(comparison, small, seeds)
    for texts in experiment.texts:
        found += _compare_texts(texts, root / "reports")
    return tuple(found)


def _compare_runs(comparison: Comparison, small: Sweep, seeds: Sweep) -> Iterator[Direction]:
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
    by_document = perplexity_ratio(ours_nats.mean(0), theirs_nats.mean(0), tokens)
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
    deviation = float(np.std(losses, ddof=1))
    return t_quantile(0.975, len(losses) - 1) * deviation * math.sqrt(1 / ours + 1 / theirs)


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
    if interval := text_difference(pairs, comparison.figure):
        yield from _directions(comparison, interval, (1, 1))


def text_difference(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], figure: TextFigure
) -> Interval | None:
    """Return the mean of a figure of the first texts less that of the second, with a 95 % interval.

    Each pair continues the same prompt. Student's t of the differences gives the interval, without the noise
    between seeds. A pair with a text that is too short for the figure is left out.

    Returns:
        None if fewer than two pairs are left.
    """
    values = [[FIGURES[figure](sample) for sample in pair] for pair in pairs]
    differences = [ours - theirs for ours, theirs in values if ours is not None and theirs is not None]
    if len(differences) < 2:
        return None
    # With equal denominators the jackknife's standard error is that of the mean.
    return ratio_interval(np.array(differences), np.ones(len(differences)))


def _numbered_words(text: str) -> list[int]:
    """Return the words and punctuation marks of a text as numbers; equal words have the same number."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return [words.index(word) for word in words]


def _directions(expected: Expected, interval: Interval, runs: tuple[int, int]) -> Iterator[Direction]:
    """Yield the outcome for each claim of a comparison."""
    is_ratio = isinstance(expected, Comparison)
    neutral = 1 if is_ratio else 0
    outcome: Outcome = "no effect found"
    if interval.low > neutral or interval.high < neutral:
        is_above = interval.low > neutral
        outcome = "same way" if is_above == (expected.expected == "above") else "other way"
    for claim in expected.claims:
        yield Direction(
            claim=claim, outcome=outcome, quantity=expected.quantity,
            unit="ratio" if is_ratio else "difference",
            value=interval.value, low=interval.low, high=interval.high, runs=runs,
            otherwise="" if outcome == "same way" else expected.otherwise,
        )  # fmt: skip
