"""The gate: check whether a new model is worse than the accepted model.

A metric fails if it is worse by more than its tolerance and by more than chance.
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

# Prefixes of keys in params.yaml that do not change the compared metrics.
_NO_EFFECT = (
    "regression.", "comparison.", "estimate.", "validation.", "inspection.", "runtime.num_workers",
    "runtime.log_interval", "runtime.sample_", "baseline.names", "training.checkpoint_interval",
    "training.init_from", "training.launcher.",
)  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """The standard deviation of the loss between training runs that differ in their seeds only."""

    deviation: float  # the standard deviation, in nats per token
    degrees_of_freedom: float  # number of measured runs - 1; infinite for an assumed deviation
    source: str  # a sentence for the verdict: where the deviation comes from

    def quantile(self, level: float) -> float:
        """Return a limit. Seed noise raises the loss by more than this limit with the probability `level`."""
        # Each run has noise, so the difference of two runs has twice the variance of one run.
        return t_quantile(1 - level, self.degrees_of_freedom) * math.sqrt(2) * self.deviation


@dataclass(frozen=True)
class Documents:
    """The total loss of a model on each document of the val split."""

    ids: tuple[str, ...]
    tokens: Array  # number of predicted tokens of each document, (documents,)
    # `perplexity` or `perplexity.<view>` -> losses that give this perplexity: total per document, in nats
    nats: Mapping[str, Array]
    of: int  # number of documents in the complete val split

    def select(self, ids: tuple[str, ...]) -> "Documents":
        """Return the losses on the documents with these ids only."""
        row_of = {name: row for row, name in enumerate(self.ids)}
        rows = [row_of[name] for name in ids]
        nats = {metric: values[rows] for metric, values in self.nats.items()}
        return Documents(ids, self.tokens[rows], nats, self.of)


@dataclass(frozen=True)
class Snapshot:
    """What the gate compares: metrics, parameters and hashes of one version of the project."""

    name: str  # name of this version in the verdict
    # Settings of the evaluation. If a value differs between the versions, the gate fails. Keys: `val`
    # (SHA-256 of the val split), `window` (length of the context windows, in tokens), `own.stride` (tokens
    # between the starts of two windows), and more.
    fingerprint: Mapping[str, Any]
    data: Mapping[str, str]  # `train` or `tokenizer` -> SHA-256 of the train split or tokenizer
    params: Mapping[str, Any]  # dotted key of params.yaml, such as `training.seed` -> value
    figures: Mapping[str, float]  # metric -> value
    baselines: Mapping[str, float]  # baseline -> loss, nats per token
    # task -> `items_sha256` (hash of all items) and `hits` (one digit for each item; 1: the answer is right)
    tasks: Mapping[str, Mapping[str, str]]
    documents: Documents
    reason: str = ""  # why a person accepted this version as the reference

    def measured(self) -> set[str]:
        """Return the names of the metrics that the gate can compare."""
        return {*self.documents.nats, *(f"accuracy.{task}" for task in self.tasks)}


@dataclass(frozen=True)
class Check:
    """The result of one check: a row in the table of the verdict."""

    name: str
    status: Status
    says: str
    then: float | None = None  # value of the accepted version
    now: float | None = None  # value of the new version
    change: float | None = None  # relative rise of a perplexity or absolute fall of an accuracy; worse if > 0
    bounds: tuple[float, float] | None = None  # confidence interval of `change`
    tolerance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The results of all checks of the gate."""

    against: str  # name of the accepted version
    reason: str  # why a person accepted the version `against`
    guards: list[Check] = field(default_factory=list)  # checks of the val split, parameters, baselines, ...
    metrics: list[Check] = field(default_factory=list)
    watched: list[Check] = field(default_factory=list)  # rows that are only shown: they can't fail
    # Rows of reports/loss.csv of the new version: `step`, `train_loss` and `val_loss`.
    curve: list[dict[str, float | None]] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """The checks in `guards` and `metrics`, without the rows in `watched`."""
        return [*self.guards, *self.metrics]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fail"]


def run_gate(
    then: Snapshot, now: Snapshot, settings: Regression, noise: Noise, throughput: float | None = None
) -> Verdict:
    """Compare the new version `now` of the project with the accepted version `then`.

    `throughput` is our training speed divided by nanoGPT's; None skips its check. If the val split or its
    windows changed, the verdict has no check of a loss or a score.
    """
    differences = _list_differences(then, now)
    verdict = Verdict(then.name, then.reason)
    same_text = _check_fingerprint(then, now)
    verdict.guards.extend([same_text, _check_parameters(differences)])
    if throughput is not None:
        least = settings.min_throughput_ratio
        says = f"the training speed is {throughput:.2f} times nanoGPT's speed; the minimum is {least:.2f}"
        status: Status = "pass" if throughput >= least else "fail"
        verdict.guards.append(Check("throughput", status, says, least, throughput))
    if same_text.status == "fail":  # losses on other text or in other windows can't be compared
        return verdict
    verdict.guards.extend(_check_baselines(then, now, settings, explained=bool(differences)))
    verdict.guards.append(Check("noise", "info", noise.source))
    for check in _check_metrics(then, now, settings, noise):
        (verdict.watched if check.status == "info" else verdict.metrics).append(check)
    checked = {check.name for check in [*verdict.metrics, *verdict.watched]}
    for name in sorted({*then.figures, *now.figures} - checked):
        verdict.watched.append(Check(name, "info", "", then.figures.get(name), now.figures.get(name)))
    return verdict


def _check_fingerprint(then: Snapshot, now: Snapshot) -> Check:
    if changes := _compare(then.fingerprint, now.fingerprint):
        what = f"the val split or its windows changed ({', '.join(changes)})"
        says = f"not comparable: {what}. Restore the old values, or use --accept"
        return Check("validation", "fail", says)
    if not set(then.documents.ids) <= set(now.documents.ids):
        return Check("validation", "fail", "not comparable: the reference has documents that are missing now")
    split = _shorten(now.fingerprint["val"])
    return Check("validation", "pass", f"both versions use val split {split} and the same context windows")


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line `key before -> after` for each key whose value differs."""
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return [f"{key} {_shorten(before.get(key))} -> {_shorten(after.get(key))}" for key in keys]


def _shorten(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # shorten a SHA-256, which has 64 digits


def _list_differences(then: Snapshot, now: Snapshot) -> list[str]:
    """Return a line for each changed parameter or hash that can affect the metrics."""
    without: tuple[str, ...] = _NO_EFFECT
    if then.data == now.data:
        without += ("download.", "tokenization.")  # they affect only the data, and the data is equal

    def acting(params: Mapping[str, Any]) -> dict[str, Any]:
        # The value of `baseline.names` is a JSON text, such as `["xz", "gpt2"]`: find the text inside quotes.
        names = re.findall('"([^"]+)"', str(params.get("baseline.names")))
        in_use = tuple(f"baseline.specs.{name}." for name in names)
        used = (key for key in params if key.startswith(in_use) or not key.startswith("baseline.specs."))
        return {key: params[key] for key in used if not key.startswith(without)}

    return _compare(acting(then.params), acting(now.params)) + _compare(then.data, now.data)


def _check_parameters(differences: list[str]) -> Check:
    if not differences:
        says = "parameters and data are equal: only code changes and chance can change the metrics"
        return Check("parameters", "pass", says)
    changes = "; ".join(differences)
    return Check("parameters", "warn", f"these changes can be the reason for changed metrics: {changes}")


def _check_baselines(
    then: Snapshot, now: Snapshot, settings: Regression, *, explained: bool
) -> Iterator[Check]:
    """Yield a check for each baseline whose loss changed, or one passed check if no loss changed.

    A changed loss fails the gate. If parameters or data changed, too (`explained`), the check only warns.
    """
    before, after = then.baselines, now.baselines
    shared = sorted(before.keys() & after.keys())
    moved = [name for name in shared if abs(after[name] - before[name]) > settings.max_baseline_change]
    for name in moved:
        says = "the baseline's loss changed, so its settings, the evaluation or the data changed"
        status: Status = "warn" if explained else "fail"
        yield Check(f"baseline.{name}", status, says, before[name], after[name])
    if shared and not moved:
        yield Check("baselines", "pass", f"baselines with the same loss in both versions: {len(shared)}")


def _check_metrics(then: Snapshot, now: Snapshot, settings: Regression, noise: Noise) -> Iterator[Check]:
    """Yield a check for each metric that has a tolerance."""
    old, new = then.measured(), now.measured()
    known = [name for name in settings.tolerances if name in old | new]
    both = [name for name in known if name in old & new]
    hits = {name: then.tasks[name.partition(".")[2]]["hits"] for name in both if name.startswith("accuracy.")}
    gated, level = choose_accuracies(hits, settings, has_perplexity=len(hits) < len(both))
    for name in known:
        before, after = then.figures.get(name), now.figures.get(name)
        if name not in new:
            yield Check(name, "fail", "no longer measured", before)
        elif name not in old:
            yield Check(name, "warn", "not in the reference", None, after)
        elif name in gated:
            yield _check_accuracy(then, now, name, settings.tolerances[name], level)
        elif name in hits:
            right, of = hits[name].count("1"), len(hits[name])
            says = (
                f"this check can't fail: the reference has only {right} right answers of {of:,}, so a model "
                "with 0 right answers would pass, too"
            )
            yield Check(name, "info", says, before, after)
        else:
            yield _check_perplexity(then, now, name, settings.tolerances[name], noise, level)


def choose_accuracies(
    hits: Mapping[str, str], settings: Regression, *, has_perplexity: bool
) -> tuple[list[str], float]:
    """Choose the accuracies that the gate tests. Return their names and the significance level of a test.

    `hits`: name of an accuracy -> one digit for each item, 1 if the accepted model's answer is right.
    The level is `settings.false_alarms` divided by the number of tests. The tests are the chosen accuracies,
    and one more test if the gate tests a perplexity, too (`has_perplexity`).
    """
    # An accuracy is tested only if a model without right answers would fail the test. For this model, the
    # fall of the accuracy must be above the tolerance and significant. McNemar's test gives p = 0.5^n for
    # this model if the accepted model has n right answers.
    right = {name: found.count("1") for name, found in hits.items()}
    able = [name for name in hits if right[name] > settings.tolerances[name] * len(hits[name])]
    able.sort(key=lambda name: -right[name])
    while able and 0.5 ** right[able[-1]] > settings.false_alarms / (has_perplexity + len(able)):
        # This accuracy's check can't fail, so remove it. With fewer tests, the level of each test is higher.
        able.pop()
    return able, settings.false_alarms / max(1, has_perplexity + len(able))


def _check_perplexity(
    then: Snapshot, now: Snapshot, name: str, tolerance: float, noise: Noise, level: float
) -> Check:
    sample = now.documents.select(then.documents.ids)
    rise = perplexity_rise(sample.nats[name], then.documents.nats[name], sample.tokens, noise, level)
    says = f"{len(sample.ids):,} documents" + (f" of {sample.of:,}" if sample.of > len(sample.ids) else "")
    before, after = then.figures.get(name), now.figures.get(name)
    bounds = (rise.low, rise.high)
    return Check(name, decide(rise, tolerance), says, before, after, rise.value, bounds, tolerance)


def perplexity_rise(nats: Array, nats_then: Array, tokens: Array, noise: Noise, level: float) -> Interval:
    """Return the relative rise of the perplexity, with its confidence interval of the level 1 - 2 * `level`.

    `nats` and `nats_then` have the total loss on each document: of the new model, and of the accepted model.
    """
    if np.array_equal(nats, nats_then):
        return Interval(0.0, 0.0, 0.0)
    scored = tokens > 0
    found = ratio_interval((nats - nats_then)[scored], tokens[scored], confidence=1 - 2 * level)
    between_runs = noise.quantile(level)
    # Add the squares of two independent errors: from the choice of documents, and from the seed of a run.
    low = found.value - math.hypot(found.value - found.low, between_runs)
    high = found.value + math.hypot(found.high - found.value, between_runs)
    return Interval(found.value, low, high).map(_relative_rise)


def _relative_rise(nats_per_token: float) -> float:
    """Return exp(nats per token) - 1; infinite if too large for a float."""
    try:
        return math.expm1(nats_per_token)
    except OverflowError:
        return math.inf


def decide(change: Interval, tolerance: float) -> Status:
    """Return `fail` if the change exceeds the tolerance and its interval is above 0.

    Return `warn` if only one of the two is true, otherwise `pass`.
    """
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
    says = f"of {len(pairs):,} items, {lost} became wrong and {won} right; p = {p_value:.2g}"
    share_before, share_now = (each["hits"].count("1") / len(pairs) for each in (before, after))
    return Check(name, status, says, share_before, share_now, fall, None, tolerance)
