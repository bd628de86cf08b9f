"""The gate: check whether a new model is worse than an accepted model, evaluated on the same documents.

A metric fails if it is worse by more than its tolerance *and* by more than chance: the sample of documents,
and the noise between training runs. If only one of the two is true, the check is a warning. All tests share
`regression.false_alarms` (Bonferroni). docs/decisions/15-gate.md has the reasons and the error rates.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt.config import Regression
from compactgpt.evaluation.metrics import Interval, mcnemar_one_sided, ratio_interval, t_quantile

Array = npt.NDArray[np.float64]
Status = Literal["pass", "warn", "fail", "info"]
Point = tuple[int, float | None, float | None]  # step, train loss, val loss

# Parameters that do not affect the compared metrics: tolerances, limits, reporting, speed.
_NO_EFFECT = (
    "regression.", "comparison.", "estimate.", "validation.", "inspection.", "runtime.num_workers",
    "runtime.log_interval", "runtime.sample_", "baseline.names", "training.checkpoint_interval",
    "training.init_from", "training.launcher.",
)  # fmt: skip
_MOST_NAMED = 5  # differences in one message


@dataclass(frozen=True)
class Noise:
    """How much the losses of two training runs differ, although nothing but chance differs.

    The runs differ in their seeds. Runs of one seed differ less, but a change of the code that only reorders
    floating-point additions gives another model, too.
    """

    deviation: float  # standard deviation of a run's loss, nats per token
    degrees_of_freedom: float  # of the estimate; infinite if the deviation is an assumption
    source: str  # where the number comes from, for the verdict

    def quantile(self, level: float) -> float:
        """Return the difference of two runs' losses that is exceeded with the probability `level`."""
        # Both runs have noise, so the variance of the difference is twice that of one run.
        return t_quantile(1 - level, self.degrees_of_freedom) * math.sqrt(2) * self.deviation


@dataclass(frozen=True)
class Documents:
    """The per-document losses of a model on the val split, or on a sample of its documents."""

    ids: tuple[str, ...]
    tokens: Array  # (documents,)
    nats: Mapping[str, Array]  # metric, such as `perplexity.strided`: nats of each document, (documents,)
    of: int  # number of documents in the complete split

    def select(self, ids: tuple[str, ...]) -> "Documents | None":
        """Return the losses of the documents `ids`, in the order of `ids`; None if a document is missing."""
        row_of = {name: row for row, name in enumerate(self.ids)}
        if not row_of.keys() >= set(ids):
            return None
        rows = [row_of[name] for name in ids]
        nats = {metric: values[rows] for metric, values in self.nats.items()}
        return Documents(ids, self.tokens[rows], nats, self.of)


@dataclass(frozen=True)
class Snapshot:
    """The metrics, parameters and hashes of one state of the project, as the gate compares them."""

    name: str  # label of the state in the verdict
    fingerprint: Mapping[str, Any]  # metrics can be compared only if it is equal
    data: Mapping[str, str]  # hashes of the train split and of the tokenizer
    params: Mapping[str, Any]  # dotted key: value
    figures: Mapping[str, float]  # metric: value
    baselines: Mapping[str, float]  # baseline: loss
    tasks: Mapping[str, Mapping[str, str]]  # task: its items_sha256 and hits
    documents: Documents
    reason: str = ""  # why the state was accepted
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Check:
    """The result of one check: a line of the verdict."""

    name: str
    status: Status
    says: str
    then: float | None = None
    now: float | None = None
    change: float | None = None  # share of the perplexity or of the task's items; above 0 is worse
    bounds: tuple[float, float] | None = None  # confidence interval of `change`
    tolerance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The results of all checks of the gate."""

    against: str
    reason: str
    guards: list[Check] = field(default_factory=list)
    metrics: list[Check] = field(default_factory=list)
    watched: list[Check] = field(default_factory=list)  # metrics that can't fail
    differences: list[str] = field(default_factory=list)  # changed parameters and data
    curve: tuple[Point, ...] = ()  # loss curve of the new state

    @property
    def checks(self) -> list[Check]:
        """The checks that can fail."""
        return [*self.guards, *self.metrics]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fail"]


def run_gate(
    then: Snapshot, now: Snapshot, settings: Regression, noise: Noise, throughput: float | None = None
) -> Verdict:
    """Compare the new state `now` with the accepted state `then`.

    `throughput` is the ratio of our training throughput to nanoGPT's on the same machine, so it does not
    depend on the machine; None skips its check.
    """
    differences = _list_differences(then, now)
    verdict = Verdict(then.name, then.reason, differences=differences, curve=now.curve)
    same_text = _check_fingerprint(then, now)
    verdict.guards.extend([same_text, _check_parameters(differences)])
    verdict.guards.extend(_check_baselines(then, now, settings, explained=bool(differences)))
    verdict.guards.append(Check("noise", "info", noise.source))
    if throughput is not None:
        least = settings.min_throughput_ratio
        says = f"training has {throughput:.2f} times nanoGPT's tokens per second; the minimum is {least:.2f}"
        status: Status = "pass" if throughput >= least else "fail"
        verdict.guards.append(Check("throughput", status, says, least, throughput))
    if same_text.status == "pass":
        for check in _check_metrics(then, now, settings, noise):
            (verdict.watched if check.status == "info" else verdict.metrics).append(check)
    checked = {check.name for check in [*verdict.metrics, *verdict.watched]}
    for name in sorted({*then.figures, *now.figures} - checked):
        verdict.watched.append(Check(name, "info", "", then.figures.get(name), now.figures.get(name)))
    return verdict


# --- guards


def _check_fingerprint(then: Snapshot, now: Snapshot) -> Check:
    """Check that the two states were evaluated on the same text, in the same windows."""
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
    """Return a line `key before -> after` for each key whose value differs."""
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return [f"{key} {_shorten(before.get(key))} -> {_shorten(after.get(key))}" for key in keys]


def _shorten(value: Any) -> str:
    """Return a value as a string; a SHA-256 is cut to 12 digits."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _list_differences(then: Snapshot, now: Snapshot) -> list[str]:
    """Return a line for each changed parameter or hash of data that can affect the metrics."""
    without: tuple[str, ...] = _NO_EFFECT
    if then.data == now.data:  # the changed parameters of the data made the same data
        without += ("download.", "tokenization.")
    before, after = (_acting_params(state.params, without) for state in (then, now))
    return _compare(before, after) + _compare(then.data, now.data)


def _acting_params(params: Mapping[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters that affect the metrics, without those of unused baselines."""
    used = re.findall('"([^"]+)"', str(params.get("baseline.names")))  # names of a JSON list
    in_use = tuple(f"baseline.specs.{name}." for name in used)
    return {
        key: value
        for key, value in params.items()
        if not key.startswith(without) and (not key.startswith("baseline.specs.") or key.startswith(in_use))
    }


def _check_parameters(differences: list[str]) -> Check:
    if not differences:
        says = "parameters and data are equal: only code changes and chance can change the metrics"
        return Check("parameters", "pass", says)
    named, more = differences[:_MOST_NAMED], len(differences) - _MOST_NAMED
    says = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
    return Check("parameters", "warn", f"changes that can explain other metrics: {says}")


def _check_baselines(
    then: Snapshot, now: Snapshot, settings: Regression, *, explained: bool
) -> Iterator[Check]:
    """Yield a check for each baseline whose loss changed; a passed check if no loss changed.

    A baseline's model never changes, so another loss shows that the evaluation or the data changed. The check
    is a failure, or a warning if `explained`: a parameter or the data changed.
    """
    before, after = then.baselines, now.baselines
    shared = sorted(before.keys() & after.keys())
    moved = [name for name in shared if abs(after[name] - before[name]) > settings.max_baseline_change]
    for name in moved:
        says = "the baseline's loss changed: the evaluation or its text changed"
        status: Status = "warn" if explained else "fail"
        yield Check(f"baseline.{name}", status, says, before[name], after[name])
    if shared and not moved:
        yield Check("baselines", "pass", f"baselines with the same loss as before: {len(shared)}")


# --- metrics


def _check_metrics(then: Snapshot, now: Snapshot, settings: Regression, noise: Noise) -> Iterator[Check]:
    """Yield the check of each metric that has a tolerance; its status is `info` if it can't fail."""

    def measured(snapshot: Snapshot, metric: str) -> bool:
        kind, _, task = metric.partition(".")
        return task in snapshot.tasks if kind == "accuracy" else metric in snapshot.documents.nats

    known = [name for name in settings.tolerances if measured(then, name) or measured(now, name)]
    both = [name for name in known if measured(then, name) and measured(now, name)]
    hits = {name: then.tasks[name.partition(".")[2]]["hits"] for name in both if name.startswith("accuracy.")}
    gated, level = choose_accuracies(hits, settings, has_perplexity=len(hits) < len(both))
    for name in known:
        before, after = then.figures.get(name), now.figures.get(name)
        if not measured(now, name):
            yield Check(name, "fail", "no longer measured", before)
        elif not measured(then, name):
            yield Check(name, "warn", "not in the reference", None, after)
        elif name in gated:
            yield _check_accuracy(then, now, name, settings.tolerances[name], level)
        elif name in hits:
            lost, of = hits[name].count("1"), len(hits[name])
            says = f"not gated: to lose all {lost} right answers of {of:,} has p = {0.5**lost:.2g}"
            yield Check(name, "info", f"{says}, and the level is {level:.2g}", before, after)
        else:
            yield _check_perplexity(then, now, name, settings.tolerances[name], noise, level)


def choose_accuracies(
    hits: Mapping[str, str], settings: Regression, *, has_perplexity: bool
) -> tuple[list[str], float]:
    """Return the accuracies whose test can fail, and the level of each group of tests.

    `hits` has, for each accuracy, a string with 1 for each item that the accepted model answers correctly.
    All perplexities are one group, since they rise and fall together, and each accuracy is one. The choice
    depends only on the accepted model's answers: it is made before the test, so the rate of false alarms
    stays as stated.
    """
    # The worst outcome is to lose all right answers: the fall is their share, and p is 0.5 to their number.
    lost = {name: found.count("1") for name, found in hits.items()}
    able = [name for name in hits if lost[name] > settings.tolerances[name] * len(hits[name])]
    able.sort(key=lambda name: -lost[name])
    while able and 0.5 ** lost[able[-1]] > settings.false_alarms / (has_perplexity + len(able)):
        able.pop()  # without the metric with the fewest right answers, the others have a higher level
    return able, settings.false_alarms / max(1, has_perplexity + len(able))


def _check_perplexity(
    then: Snapshot, now: Snapshot, name: str, tolerance: float, noise: Noise, level: float
) -> Check:
    sample = now.documents.select(then.documents.ids)
    assert sample is not None  # _check_fingerprint compared the ids
    rise = perplexity_rise(sample.nats[name], then.documents.nats[name], sample.tokens, noise, level)
    says = f"{len(sample.ids):,} documents" + (f" of {sample.of:,}" if sample.of > len(sample.ids) else "")
    before, after = then.figures.get(name), now.figures.get(name)
    bounds = (rise.low, rise.high)
    return Check(name, decide(rise, tolerance), says, before, after, rise.value, bounds, tolerance)


def perplexity_rise(nats: Array, nats_then: Array, tokens: Array, noise: Noise, level: float) -> Interval:
    """Return the relative rise of the perplexity on the same documents, with its confidence interval.

    The arrays, (documents,), are the nats under the new and the accepted model, and the number of tokens.
    With the probability `level`, the interval is above 0 although the perplexity did not rise.
    """
    if np.array_equal(nats, nats_then):
        return Interval(0.0, 0.0, 0.0)
    scored = tokens > 0
    found = ratio_interval((nats - nats_then)[scored], tokens[scored], confidence=1 - 2 * level)
    between_runs = noise.quantile(level)
    # The two sources of variance are independent: add the squares of their distances from the estimate.
    low = found.value - math.hypot(found.value - found.low, between_runs)
    high = found.value + math.hypot(found.high - found.value, between_runs)
    return Interval(found.value, low, high).map(math.expm1)


def decide(change: Interval, tolerance: float) -> Status:
    """Return `fail` if a change is above the tolerance and its interval above 0, `warn` if only one is."""
    beyond, sure = change.value > tolerance, change.low > 0
    return "fail" if beyond and sure else "warn" if beyond or sure else "pass"


def _check_accuracy(then: Snapshot, now: Snapshot, name: str, tolerance: float, level: float) -> Check:
    task = name.partition(".")[2]
    before, after = then.tasks[task], now.tasks[task]
    if before["items_sha256"] != after["items_sha256"] or len(before["hits"]) != len(after["hits"]):
        return Check(name, "fail", "not comparable: the task's items changed")
    pairs = list(zip(before["hits"], after["hits"], strict=True))
    lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
    p_value = mcnemar_one_sided(lost, won)
    fall = (lost - won) / len(pairs)
    status: Status = "pass" if fall <= tolerance else "fail" if p_value <= level else "warn"
    says = f"of {len(pairs):,} items {lost} lost, {won} won; p = {p_value:.2g}"
    share_before, share_now = (each["hits"].count("1") / len(pairs) for each in (before, after))
    return Check(name, status, says, share_before, share_now, fall, None, tolerance)
