"""The gate: has the model got worse than an accepted one, by more than is tolerated and more than chance?

Both are measured on the same documents, so that how hard a document is cancels out. A metric fails when it
is worse by more than its tolerance *and* the interval of the change leaves out "no change": the tolerance
says what matters, the interval what is known; one of the two alone is a warning. The interval has two
parts: the documents (paired cluster bootstrap) and the runs themselves, since two trainings that only sum
in another order are two models (`regression.rerun_noise`). docs/decisions/15-gate.md has both error rates.

Guards come first: on another val split nothing can be compared, and where a baseline moved that nobody
touched, the ruler moved. `compactgpt.references` reads what to compare with, and `compactgpt.gate.formats`
renders the verdict.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt import config
from compactgpt.evaluation.metrics import Interval, ratio_bootstrap

Array = npt.NDArray[np.float64]
Status = Literal["pass", "warn", "fail", "info"]

Point = tuple[int, float | None, float | None]  # step, train loss, val loss

# Parameters that change no figure that the gate compares: bounds, displays, limits, how fast something runs.
_NO_EFFECT = ("regression.", "comparison.", "estimate.", "validation.", "inspection.", "runtime.num_workers",
              "runtime.log_interval", "runtime.sample_", "baseline.names", "training.checkpoint_interval",
              "training.init_from", "training.launcher.")  # fmt: skip
# Parameters that act only where another one has this value.
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
    of: int = 0  # documents of the split, where these are a sample

    def rows(self, ids: tuple[str, ...]) -> "Documents | None":
        """The same for some documents in their order; None where one is missing."""
        place = {name: row for row, name in enumerate(self.ids)}
        if not place.keys() >= set(ids):
            return None
        rows = [place[name] for name in ids]
        nats = {metric: values[rows] for metric, values in self.nats.items()}
        return Documents(ids, self.tokens[rows], nats, self.of or len(self.ids))


@dataclass(frozen=True)
class Snapshot:
    """What the gate knows of one state of the project."""

    name: str  # where it comes from
    ruler: Mapping[str, Any]  # what must be equal for figures to be comparable
    data: Mapping[str, str]  # hashes
    params: Mapping[str, Any]  # flat
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
    change: float | None = None  # above 0 is worse: a share, of the perplexity or of a task's items
    bounds: tuple[float, float] | None = None  # of the change
    tolerance: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate found."""

    against: str
    reason: str
    guards: list[Check] = field(default_factory=list)
    metrics: list[Check] = field(default_factory=list)
    watched: list[Check] = field(default_factory=list)
    differences: list[str] = field(
        default_factory=list
    )  # of parameters and data, which explain other figures
    curve: tuple[Point, ...] = ()  # of the state in question

    @property
    def checks(self) -> list[Check]:
        """Those that can fail."""
        return [*self.guards, *self.metrics]

    @property
    def failures(self) -> list[Check]:
        """Those that did."""
        return [check for check in self.checks if check.status == "fail"]


def judge(
    then: Snapshot, now: Snapshot, settings: config.Regression, bench: Mapping[str, Any] | None = None
) -> Verdict:
    """Compare two states of the project.

    Args:
        then: the accepted one.
        now: the one in question.
        settings: section `regression`.
        bench: what `benchmarks/training.py --json` wrote, if throughput is to be judged.
    """
    explained = _differences(then, now)
    verdict = Verdict(then.name, then.reason, differences=explained, curve=now.curve)
    verdict.guards.append(_ruler(then, now))
    verdict.guards.append(_explanation(explained))
    verdict.guards.extend(_baselines(then, now, settings, bool(explained)))
    if bench is not None:
        verdict.guards.append(_throughput(bench, settings))
    if verdict.guards[0].status == "pass":
        verdict.metrics.extend(_metrics(then, now, settings))
    measured = {check.name for check in verdict.metrics}
    verdict.watched.extend(
        Check(name, "info", "", then.figures.get(name), now.figures.get(name))
        for name in sorted({*then.figures, *now.figures} - measured)
    )
    return verdict


def _ruler(then: Snapshot, now: Snapshot) -> Check:
    """Figures are comparable only on the same text, in the same windows."""
    other = sorted(key for key in {*then.ruler, *now.ruler} if then.ruler.get(key) != now.ruler.get(key))
    if other:
        says = ", ".join(
            f"{key} {_short(then.ruler.get(key))} -> {_short(now.ruler.get(key))}" for key in other
        )
        return Check(
            "validation",
            "fail",
            f"not comparable: {says}. Restore it, or accept these reports as the new reference",
        )
    if now.documents.rows(then.documents.ids) is None:
        return Check("validation", "fail", "not comparable: the reference has documents that are missing now")
    return Check("validation", "pass", f"the same val split, {_short(now.ruler['val'])}, in the same windows")


def _differences(then: Snapshot, now: Snapshot) -> list[str]:
    """List what explains other figures: parameters that act, and data, which are not the same."""
    before, after = acting_params(then), acting_params(now)
    if then.data == now.data:  # then the parameters that make data change nothing
        before, after = (
            {
                key: value
                for key, value in params.items()
                if not key.startswith(("download.", "tokenization."))
            }
            for params in (before, after)
        )
    found = [
        f"{key} {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    return found + [
        f"{key} {_short(then.data.get(key))} -> {_short(now.data.get(key))}"
        for key in sorted({*then.data, *now.data})
        if then.data.get(key) != now.data.get(key)
    ]


def acting_params(state: Snapshot) -> dict[str, Any]:
    """Keep the parameters that act on the figures: of the models that ran and of the corpus that was read."""
    params = state.params
    return {
        key: value for key, value in params.items() if not key.startswith(_NO_EFFECT) and _acts(key, params)
    }


def _acts(key: str, params: Mapping[str, Any]) -> bool:
    section, _, rest = key.partition(".")
    if key in _ONLY_WITH:
        other, value = _ONLY_WITH[key]
        return bool(params.get(other) == value)
    if key.startswith("baseline.specs."):
        names = re.findall('"([^"]+)"', str(params.get("baseline.names")))  # a list, as JSON
        return any(rest.startswith(f"specs.{name}.") for name in names)
    if section == "download":
        corpus, _, rest = rest.partition(".")
        if corpus in ("docstrings", "files", "hub") and corpus != params.get("download.corpus"):
            return False
        return not rest.startswith("sets.") or rest.startswith(f"sets.{params.get('download.hub.name')}.")
    return True


def _explanation(differences: list[str]) -> Check:
    if not differences:
        return Check("parameters", "pass", "the same parameters and data: only code and chance can differ")
    named, more = differences[:_MOST_NAMED], len(differences) - _MOST_NAMED
    says = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
    return Check("parameters", "warn", f"other figures are explained by: {says}")


def _baselines(
    then: Snapshot, now: Snapshot, settings: config.Regression, explained: bool
) -> Iterator[Check]:
    """Baselines are measured anew and must not move: where one does, it is the ruler that moved."""
    shared = sorted(set(then.baselines) & set(now.baselines))
    moved = [
        name for name in shared
        if abs(now.baselines[name] - then.baselines[name]) > settings.max_baseline_change
    ]  # fmt: skip
    for name in moved:
        yield Check(
            f"baseline.{name}",
            "warn" if explained else "fail",
            "a baseline moved: the measuring changed, or what it is measured on",
            then.baselines[name],
            now.baselines[name],
        )
    if shared and not moved:
        yield Check("baselines", "pass", f"{len(shared)} baselines measure the same as before")


def _throughput(bench: Mapping[str, Any], settings: config.Regression) -> Check:
    """Training's speed as a ratio to nanoGPT's, in turns on one machine: seconds would be the machine's."""
    ratio, least = float(bench["engines"]["ours"]["ratio"]), settings.min_throughput_ratio
    good = ratio >= least
    says = f"training makes {ratio:.2f} times nanoGPT's tokens a second, wanted {least:.2f}"
    return Check("throughput", "pass" if good else "fail", says, least, ratio)


def _metrics(then: Snapshot, now: Snapshot, settings: config.Regression) -> Iterator[Check]:
    """The metrics that can fail; the chance of a false alarm is shared out evenly (Bonferroni)."""
    known = [name for name in settings.tolerances if _has(then, name) or _has(now, name)]
    for name in known:
        tolerance, level = settings.tolerances[name], settings.false_alarms / len(known)
        if not _has(now, name):
            yield Check(name, "fail", "no longer measured", then.figures.get(name))
        elif not _has(then, name):
            yield Check(name, "warn", "not in the reference", None, now.figures.get(name))
        elif name.startswith("accuracy."):
            yield _accuracy(then, now, name, tolerance, level)
        else:
            yield _perplexity(then, now, name, settings, level)


def _has(snapshot: Snapshot, metric: str) -> bool:
    kind, _, task = metric.partition(".")
    return task in snapshot.tasks if kind == "accuracy" else metric in snapshot.documents.nats


def _perplexity(then: Snapshot, now: Snapshot, name: str, settings: config.Regression, level: float) -> Check:
    sample = now.documents.rows(then.documents.ids)
    assert sample is not None  # seen by _ruler
    rise = perplexity_rise(sample.nats[name], then.documents.nats[name], sample.tokens, settings, level)
    says = f"{len(sample.ids):,} documents" + (f" of {sample.of:,}" if sample.of > len(sample.ids) else "")
    tolerance = settings.tolerances[name]
    return Check(name, decide(rise, tolerance), says, then.figures.get(name), now.figures.get(name),
                 rise.value, (rise.low, rise.high), tolerance)  # fmt: skip


def perplexity_rise(
    nats: Array, nats_then: Array, tokens: Array, settings: config.Regression, level: float
) -> Interval:
    """Rise of the perplexity on the same documents, as a share, with an interval for chance.

    Args:
        nats: sums by document. (documents,)
        nats_then: the same of the accepted model. (documents,)
        tokens: by document. (documents,)
        settings: resamples, seed, and the noise between runs that should be equal.
        level: chance that the interval lies wholly above a rise that is not there.
    """
    if np.array_equal(nats, nats_then):
        return Interval(0.0, 0.0, 0.0)
    held = tokens > 0
    found = ratio_bootstrap(
        (nats - nats_then)[held], tokens[held],
        resamples=settings.resamples, seed=settings.seed, confidence=1 - 2 * level,
    )  # fmt: skip
    noise = NormalDist().inv_cdf(1 - level) * settings.rerun_noise
    # two independent sources: their distances from the estimate add as squares
    low = found.value - math.hypot(found.value - found.low, noise)
    high = found.value + math.hypot(found.high - found.value, noise)
    return Interval(found.value, low, high).map(math.expm1)


def decide(change: Interval, tolerance: float) -> Status:
    """Fail where the change is worse than the tolerance and than chance; warn where it is one of both."""
    beyond, sure = change.value > tolerance, change.low > 0
    return "fail" if beyond and sure else "warn" if beyond or sure else "pass"


def _accuracy(then: Snapshot, now: Snapshot, name: str, tolerance: float, level: float) -> Check:
    task = name.partition(".")[2]
    before, after = then.tasks[task], now.tasks[task]
    if before["items_sha256"] != after["items_sha256"] or len(before["hits"]) != len(after["hits"]):
        return Check(name, "fail", "not comparable: other items are asked")
    pairs = list(zip(before["hits"], after["hits"], strict=True))
    lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
    chance = flips_by_chance(lost, won)
    fall = (lost - won) / len(pairs)
    beyond, sure = fall > tolerance, chance <= level
    status: Status = "fail" if beyond and sure else "warn" if beyond else "pass"
    says = f"of {len(pairs):,} items {lost} lost, {won} won; by chance with p = {chance:.2g}"
    was, is_now = (task["hits"].count("1") / len(pairs) for task in (before, after))
    return Check(name, status, says, was, is_now, fall, None, tolerance)


def flips_by_chance(lost: int, won: int) -> float:
    """Chance that at least `lost` of the items that changed were lost, were it a fair coin's flip.

    McNemar's exact test (1947), one-sided: `metrics.mcnemar` asks for a difference in either direction.
    """
    flips = lost + won
    return float(sum(math.comb(flips, k) for k in range(lost, flips + 1)) / 2**flips)


def _short(value: Any) -> str:
    """A hash by its first digits; anything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
