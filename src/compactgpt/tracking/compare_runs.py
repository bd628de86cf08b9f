"""Two versions of the project explained: parameters, data, code, environment, and figures with significance.

Where both have sums by document of the same documents, figures are compared in pairs: the perplexity ratio
with its 95 % interval, by `metrics.perplexity_ratio`.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.evaluation.likelihood import Totals, read_totals
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.tracking.dvc_files import PARAMS, Cache, Commit, deps, git, outs, parse_yaml
from compactgpt.tracking.journal import flatten, numbers
from compactgpt.tracking.records import Record, find, read_table

RESAMPLES, SEED = 2000, 1  # params.yaml's evaluation.likelihood has the same; here both may differ
_MEASURING = ("training", "evaluation", "baseline")
_SHOWN = ("loss.value", "perplexity.value", "bits_per_byte.value")
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Ratio:
    """One model's perplexity in B over that in A, on the documents of both."""

    model: str
    documents: int
    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes that nothing changed."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Difference:
    """What is other in B than in A; equal things are left out."""

    a: str
    b: str
    params: dict[str, Pair] = field(default_factory=dict)
    data: dict[str, Pair] = field(default_factory=dict)  # outs by path, hashes
    code: str = ""  # git diff --stat
    packages: dict[str, Pair] = field(default_factory=dict)
    machine: dict[str, Pair] = field(default_factory=dict)
    metrics: dict[str, Pair] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)  # models whose documents are not the same, and why

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        found["ratios"] = [{**asdict(one), "significant": one.significant} for one in self.ratios]
        return found


def of(a: str, b: str, root: Path) -> Difference:
    """Compare two versions by their names: see `records.find`."""
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        folders = [Path(scratch) / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        first, second = (find(root, name, folder) for name, folder in zip((a, b), folders, strict=True))
        return explain(first, second, root)


def explain(a: Record, b: Record, root: Path) -> Difference:
    """Compare two records.

    Args:
        a: the earlier, by convention.
        b: the other.
        root: the repository, for git and DVC's cache.
    """
    ratios, unpaired = _ratios(a, b, Cache(root))
    return Difference(
        a.name,
        b.name,
        params=_differing(_params(a), _params(b)),
        data=_differing(_outs(a), _outs(b)),
        code=_code(a, b, root),
        packages=_packages(a, b),
        machine=_differing(a.machine, b.machine) if a.machine and b.machine else {},
        metrics=_differing(_metrics(a), _metrics(b)),
        ratios=ratios,
        unpaired=unpaired,
    )


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Keys with other values; None stands for a key that one lacks."""
    return {key: (a.get(key), b.get(key)) for key in [*a, *(b.keys() - a.keys())] if a.get(key) != b.get(key)}


def _packages(a: Record, b: Record) -> dict[str, Pair]:
    """Other versions. A revision only asks for packages: then those that both name, by public version."""
    if not a.packages or not b.packages:
        return {}
    if not isinstance(a.place, Commit) and not isinstance(b.place, Commit):
        return _differing(a.packages, b.packages)
    common = a.packages.keys() & b.packages.keys()
    one, other = (
        {name: version.partition("+")[0] for name, version in record.packages.items() if name in common}
        for record in (a, b)
    )
    return _differing(one, other)


def _params(record: Record) -> dict[str, Any]:
    return dict(flatten(parse_yaml(record.place.read(PARAMS), PARAMS)))


def _outs(record: Record) -> dict[str, str]:
    """Hashes of data and models, and of the corpus that they come from: what is neither report nor code."""
    found: dict[str, str] = {}
    for entry in (record.chain.entries.get(stage, {}) for stage in record.chain.stages):
        found |= {path: md5 for path, md5 in outs(entry).items() if not path.startswith("reports/")}
        found |= {path: md5 for path, md5 in deps(entry).items() if path == "corpus"}
    return found


def _metrics(record: Record) -> dict[str, float]:
    """Headline figures of every model, and the training's losses."""
    found = {}
    for stage in record.chain.stages:
        for path in outs(record.chain.entries.get(stage, {})):
            content = record.place.read(path) if path.endswith(".json") else None
            if content is None or stage.partition("@")[0] not in _MEASURING:
                continue
            name = stage.rpartition("@")[2]
            for key, value in numbers(json.loads(content)).items():
                if key in _SHOWN or key.endswith(("train_loss", "val_loss")):
                    found[f"{name}: {key.removesuffix('.value')}"] = value
    return found


def _code(a: Record, b: Record, root: Path) -> str:
    """What git says of the two commits, and whether there were changes beside."""
    lines = []
    if a.commit and b.commit and a.commit != b.commit:
        try:
            wanted = ("--", ".", ":(exclude)reports", ":(exclude)dvc.lock", ":(exclude)params.yaml")
            lines.append(git(root, "diff", "--stat", a.commit, b.commit, *wanted))
        except UserError as error:
            lines.append(f"{a.commit[:9]}..{b.commit[:9]}: {error}")
    for record in (a, b):
        if record.diff is None:
            lines.append(f"{record.name} had uncommitted changes that were not kept")
        elif record.diff and a.diff != b.diff:
            text = record.diff.decode(errors="replace").splitlines()
            names = [line.split(" b/")[-1] for line in text if line.startswith("diff --git")]
            lines.append(f"{record.name} had uncommitted changes: {', '.join(names)}")
    return "\n".join(line for line in lines if line)


def _ratios(a: Record, b: Record, cache: Cache) -> tuple[list[Ratio], list[str]]:
    """Every model that both have, on the same documents."""
    ratios, unpaired = [], []
    for path in (path for path in _tables(a) if path in _tables(b)):
        name = Path(path).stem
        first, second = _totals(a, cache, path), _totals(b, cache, path)
        if first is None or second is None:
            unpaired.append(f"{name}: its sums by document are not at hand")
        elif first.ids != second.ids or list(first.tokens) != list(second.tokens):
            unpaired.append(f"{name}: the documents of the val split are not the same")
        else:
            found = perplexity_ratio(
                second.nats, first.nats, second.tokens.astype(float), resamples=RESAMPLES, seed=SEED
            )
            ratios.append(Ratio(name, len(first.ids), found.value, found.low, found.high))
    return ratios, unpaired


def _tables(record: Record) -> list[str]:
    """Paths of the tables of sums by document that a chain made."""
    found = []
    for entry in (record.chain.entries.get(stage, {}) for stage in record.chain.stages):
        for path in outs(entry):
            if path.startswith("data/baseline/"):
                found.append(path)
            elif path == "data/evaluation":
                found.append(f"{path}/compact.parquet")
    return found


def _totals(record: Record, cache: Cache, path: str) -> Totals | None:
    content = read_table(record, cache, path)
    if content is None:
        return None
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        (file := Path(scratch) / "totals.parquet").write_bytes(content)
        return read_totals(file)


def lines(found: Difference) -> list[str]:
    """The difference as people read it."""
    text = [f"A  {found.a}", f"B  {found.b}"]
    for title, pairs in [
        ("parameters", found.params),
        ("data and models", {key: (_short(one), _short(other)) for key, (one, other) in found.data.items()}),
        ("packages", found.packages),
        ("machine", found.machine),
        ("figures", {key: (_figure(one), _figure(other)) for key, (one, other) in found.metrics.items()}),
    ]:
        text += ["", f"{title}:" if pairs else f"{title}: the same"]
        width = max((len(key) for key in pairs), default=0)
        text += [f"  {key:{width}}  {_told(one)} -> {_told(other)}" for key, (one, other) in pairs.items()]
    code = found.code.splitlines()
    text += ["", "code:" if code else "code: the same", *(f"  {line}" for line in code)]
    text += ["", "perplexity of B over A, paired over documents (95 %):"]
    for one in found.ratios:
        sure = "significant" if one.significant else "no significant difference"
        text.append(
            f"  {one.model}: {one.value:.4f} ({one.low:.4f} to {one.high:.4f}), "
            f"{one.documents:,} documents: {'equal' if one.low == one.high == 1.0 else sure}"
        )
    return [*text, *(f"  {line}" for line in found.unpaired)]


def _told(value: Any) -> str:
    return "-" if value is None else str(value)


def _short(md5: str | None) -> str | None:
    return md5[:9] if md5 else None


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
