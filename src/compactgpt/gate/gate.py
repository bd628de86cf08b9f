"""The gate: is the model worse than an accepted one, by more than is tolerated and more than chance?

Both are measured on the same documents, so that how hard a document is cancels out. A metric fails when it
is worse by more than its tolerance *and* the interval of the change is above "no change"; one of the two
alone is a warning. The interval has two sources: the documents (paired cluster bootstrap), and the runs,
since two trainings that only add numbers in another order are two models (`regression.rerun_noise`).
docs/decisions/15-gate.md has both error rates.

Guards are checked first: on another val split nothing can be compared, and if a baseline moved without a
reason, the evaluation changed. `references` reads the two states, and `formats` renders the verdict.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt.config import Regression
from compactgpt.evaluation.metrics import Interval, ratio_bootstrap

Array = npt.NDArray[np.float64]
Status = Literal["pass", "warn", "fail", "info"]
Point = tuple[int, float | None, float | None]  # step, train loss, val loss

# Parameters that change none of the compared figures: bounds, displays, limits, speed.
_NO_EFFECT = (
    "regression.", "comparison.", "estimate.", "validation.", "inspection.", "runtime.num_workers",
    "runtime.log_interval", "runtime.sample_", "baseline.names", "training.checkpoint_interval",
    "training.init_from", "training.launcher.",
)  # fmt: skip
# Parameters that have an effect only if another one has this value.
_ONLY_WITH = {
    "training.muon_learning_rate": ("training.optimizer", "muon"),
    "training.decay_share": ("training.schedule", "wsd"),
}
_MOST_NAMED = 5  # parameters in one sentence


@dataclass(frozen=True)
class Documents:
    """Sums by document."""

    ids: tuple[str, ...]
    tokens: Array  # (documents,)
    nats: Mapping[str, Array]  # by metric, such as `perplexity.strided`: (documents,)
    of: int  # documents of the split, if these are a sample of them

    def select(self, ids: tuple[str, ...]) -> "Documents | None":
        """Return the sums of some documents in their order; None if one of them is missing."""
        row_of = {name: row for row, name in enumerate(self.ids)}
        if not row_of.keys() >= set(ids):
            return None
        rows = [row_of[name] for name in ids]
        nats = {metric: values[rows] for metric, values in self.nats.items()}
        return Documents(ids, self.tokens[rows], nats, self.of)


@dataclass(frozen=True)
class Snapshot:
    """What the gate compares of one state of the project."""

    name: str  # where it comes from
    fingerprint: Mapping[str, Any]  # of the evaluation: figures compare only if it is equal
    data: Mapping[str, str]  # hashes
    params: Mapping[str, Any]  # by dotted key
    figures: Mapping[str, float]
    baselines: Mapping[str, float]  # loss
    tasks: Mapping[str, Mapping[str, str]]  # items_sha256 and hits
    documents: Documents
    reason: str = ""  # why it was accepted
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    status: Status
    says: str
    then: float | None = None
    now: float | None = None
    change: float | None = None  # above 0 is worse: a share of the perplexity or of a task's items
    bounds: tuple[float, float] | None = None  # of the change
    tolerance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate found."""

    against: str
    reason: str
    guards: list[Check] = field(default_factory=list)
    metrics: list[Check] = field(default_factory=list)
    watched: list[Check] = field(default_factory=list)  # figures that can't fail
    differences: list[str] = field(default_factory=list)  # of parameters and data that explain other figures
    curve: tuple[Point, ...] = ()  # of the new state

    @property
    def checks(self) -> list[Check]:
        """The checks that can fail."""
        return [*self.guards, *self.metrics]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fail"]


def run_gate(
    then: Snapshot, now: Snapshot, settings: Regression, bench: Mapping[str, Any] | None = None
) -> Verdict:
    """Compare two states of the project.

    Args:
        then: the accepted state.
        now: the new state.
        settings: section `regression`.
        bench: what `benchmarks/training.py --json` wrote, if throughput is checked too.
    """
    differences = _list_differences(then, now)
    verdict = Verdict(then.name, then.reason, differences=differences, curve=now.curve)
    same_text = _check_fingerprint(then, now)
    verdict.guards.extend([same_text, _check_parameters(differences)])
    verdict.guards.extend(_check_baselines(then, now, settings, explained=bool(differences)))
    if bench is not None:
        verdict.guards.append(_check_throughput(bench, settings))
    if same_text.status == "pass":
        verdict.metrics.extend(_check_metrics(then, now, settings))
    checked = {check.name for check in verdict.metrics}
    for name in sorted({*then.figures, *now.figures} - checked):
        verdict.watched.append(Check(name, "info", "", then.figures.get(name), now.figures.get(name)))
    return verdict


# --- guards


def _check_fingerprint(then: Snapshot, now: Snapshot) -> Check:
    """Fail unless both states were measured on the same text, in the same windows."""
    if changes := _compare(then.fingerprint, now.fingerprint):
        says = (
            f"not comparable: {', '.join(changes)}. Restore it, or accept these reports as the new reference"
        )
        return Check("validation", "fail", says)
    if now.documents.select(then.documents.ids) is None:
        return Check("validation", "fail", "not comparable: the reference has documents that are missing now")
    split = _shorten(now.fingerprint["val"])
    return Check("validation", "pass", f"the same val split, {split}, in the same windows")


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each key whose value differs."""
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return [f"{key} {_shorten(before.get(key))} -> {_shorten(after.get(key))}" for key in keys]


def _shorten(value: Any) -> str:
    """Return the first digits of a hash; anything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _list_differences(then: Snapshot, now: Snapshot) -> list[str]:
    """Return the parameters and data that differ and explain other figures."""
    before, after = acting_params(then.params), acting_params(now.params)
    if then.data == now.data:  # the parameters that make the data have made no difference
        for params in (before, after):
            for key in [key for key in params if key.startswith(("download.", "tokenization."))]:
                del params[key]
    return _compare(before, after) + _compare(then.data, now.data)


def acting_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that affect the figures: of the models that ran and of the corpus in use."""
    return {key: value for key, value in params.items() if _has_effect(key, params)}


def _has_effect(key: str, params: Mapping[str, Any]) -> bool:
    if key.startswith(_NO_EFFECT):
        return False
    if key in _ONLY_WITH:
        other, value = _ONLY_WITH[key]
        return bool(params.get(other) == value)
    if key.startswith("baseline.specs."):
        names = re.findall('"([^"]+)"', str(params.get("baseline.names")))  # a list, as JSON
        return key.startswith(tuple(f"baseline.specs.{name}." for name in names))
    for corpus in ("docstrings", "files", "hub"):
        if key.startswith(f"download.{corpus}.") and corpus != params.get("download.corpus"):
            return False
    in_use = f"download.hub.sets.{params.get('download.hub.name')}."
    return not key.startswith("download.hub.sets.") or key.startswith(in_use)


def _check_parameters(differences: list[str]) -> Check:
    if not differences:
        return Check("parameters", "pass", "the same parameters and data: only code and chance can differ")
    named, more = differences[:_MOST_NAMED], len(differences) - _MOST_NAMED
    says = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
    return Check("parameters", "warn", f"other figures are explained by: {says}")


def _check_baselines(
    then: Snapshot, now: Snapshot, settings: Regression, *, explained: bool
) -> Iterator[Check]:
    """Yield a failure for each baseline that moved: its model is the same, so the evaluation changed."""
    shared = sorted(set(then.baselines) & set(now.baselines))
    moved = 0
    for name in shared:
        before, after = then.baselines[name], now.baselines[name]
        if abs(after - before) > settings.max_baseline_change:
            moved += 1
            says = "a baseline moved: the evaluation changed, or the text that it measures on"
            yield Check(f"baseline.{name}", "warn" if explained else "fail", says, before, after)
    if shared and not moved:
        yield Check("baselines", "pass", f"{len(shared)} baselines measure the same as before")


def _check_throughput(bench: Mapping[str, Any], settings: Regression) -> Check:
    """Check the speed of training as a ratio to nanoGPT's on the same machine, which cancels the machine."""
    ratio, least = float(bench["engines"]["ours"]["ratio"]), settings.min_throughput_ratio
    says = f"training makes {ratio:.2f} times nanoGPT's tokens a second, wanted {least:.2f}"
    return Check("throughput", "pass" if ratio >= least else "fail", says, least, ratio)


# --- metrics


def _check_metrics(then: Snapshot, now: Snapshot, settings: Regression) -> Iterator[Check]:
    """Yield the check of each metric with a tolerance."""

    def measured(snapshot: Snapshot, metric: str) -> bool:
        kind, _, task = metric.partition(".")
        return task in snapshot.tasks if kind == "accuracy" else metric in snapshot.documents.nats

    known = [name for name in settings.tolerances if measured(then, name) or measured(now, name)]
    for name in known:
        level = settings.false_alarms / len(known)  # Bonferroni
        if not measured(now, name):
            yield Check(name, "fail", "no longer measured", then.figures.get(name))
        elif not measured(then, name):
            yield Check(name, "warn", "not in the reference", None, now.figures.get(name))
        elif name.startswith("accuracy."):
            yield _check_accuracy(then, now, name, settings.tolerances[name], level)
        else:
            yield _check_perplexity(then, now, name, settings, level)


def _check_perplexity(then: Snapshot, now: Snapshot, name: str, settings: Regression, level: float) -> Check:
    sample = now.documents.select(then.documents.ids)
    assert sample is not None  # by _check_fingerprint
    rise = perplexity_rise(sample.nats[name], then.documents.nats[name], sample.tokens, settings, level)
    says = f"{len(sample.ids):,} documents" + (f" of {sample.of:,}" if sample.of > len(sample.ids) else "")
    tolerance = settings.tolerances[name]
    return Check(
        name, decide(rise, tolerance), says, then.figures.get(name), now.figures.get(name),
        rise.value, (rise.low, rise.high), tolerance,
    )  # fmt: skip


def perplexity_rise(
    nats: Array, nats_then: Array, tokens: Array, settings: Regression, level: float
) -> Interval:
    """Return the rise of the perplexity on the same documents, as a share, with an interval for chance.

    Args:
        nats: sums by document. (documents,)
        nats_then: the same of the accepted model. (documents,)
        tokens: by document. (documents,)
        settings: resamples, seed, and the noise between runs that should be equal.
        level: probability that the interval is above 0 although nothing rose.
    """
    if np.array_equal(nats, nats_then):
        return Interval(0.0, 0.0, 0.0)
    scored = tokens > 0
    found = ratio_bootstrap(
        (nats - nats_then)[scored], tokens[scored],
        resamples=settings.resamples, seed=settings.seed, confidence=1 - 2 * level,
    )  # fmt: skip
    noise = NormalDist().inv_cdf(1 - level) * settings.rerun_noise
    # The two sources are independent: their distances from the estimate add as squares.
    low = found.value - math.hypot(found.value - found.low, noise)
    high = found.value + math.hypot(found.high - found.value, noise)
    return Interval(found.value, low, high).map(math.expm1)


def decide(change: Interval, tolerance: float) -> Status:
    """Return fail if the change is beyond the tolerance and beyond chance, warn if beyond one of them."""
    beyond, sure = change.value > tolerance, change.low > 0
    return "fail" if beyond and sure else "warn" if beyond or sure else "pass"


def _check_accuracy(then: Snapshot, now: Snapshot, name: str, tolerance: float, level: float) -> Check:
    task = name.partition(".")[2]
    before, after = then.tasks[task], now.tasks[task]
    if before["items_sha256"] != after["items_sha256"] or len(before["hits"]) != len(after["hits"]):
        return Check(name, "fail", "not comparable: other items are asked")
    pairs = list(zip(before["hits"], after["hits"], strict=True))
    lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
    p_value = mcnemar_one_sided(lost, won)
    fall = (lost - won) / len(pairs)
    beyond, sure = fall > tolerance, p_value <= level
    status: Status = "fail" if beyond and sure else "warn" if beyond else "pass"
    says = f"of {len(pairs):,} items {lost} lost, {won} won; by chance with p = {p_value:.2g}"
    share_before, share_now = (task["hits"].count("1") / len(pairs) for task in (before, after))
    return Check(name, status, says, share_before, share_now, fall, None, tolerance)


def mcnemar_one_sided(lost: int, won: int) -> float:
    """Return the probability that at least `lost` of the items that changed were lost by chance.

    McNemar's exact test (1947), one-sided; `metrics.mcnemar` tests for a difference in either direction.
    """
    changed = lost + won
    return float(sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed)
