"""Compare two versions of the project: parameters, data, code, packages, machine and metrics.

If the two versions have losses of the same documents, the ratio of their perplexities is computed, with a
95 % interval from the paired losses of each document.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, UserError
from compactgpt.common.git import git_text
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.evaluation.totals import Totals, read_totals
from compactgpt.tracking.dvc_files import PARAMS, Cache, Folder, deps, outs, parse_yaml
from compactgpt.tracking.journal import flatten, numbers
from compactgpt.tracking.records import (
    Pair,
    Version,
    changed_machine,
    changed_packages,
    differing,
    find_version,
)

_STAGES = ("training", "evaluation", "baseline")  # the stages whose metrics are compared
# The metrics to compare: full keys in a report, and (for the losses of training) ends of keys.
_FIGURES = ("loss.value", "perplexity.value", "bits_per_byte.value")
_LOSSES = ("train_loss", "val_loss")


@dataclass(frozen=True)
class Ratio:
    """A model's perplexity in version B divided by its perplexity in version A, on the same documents."""

    model: str
    documents: int  # the number of documents
    value: float  # the ratio of the two perplexities
    low: float  # lower end of the 95 % interval
    high: float  # upper end of the 95 % interval
    significant: bool  # the interval does not contain 1


@dataclass(frozen=True)
class Difference:
    """The differences between versions A and B. A `Pair` has the value in A and the value in B."""

    a: str  # name of version A
    b: str  # name of version B
    params: dict[str, Pair]  # by dotted key of params.yaml
    data: dict[str, Pair]  # MD5 hashes of data and models, by path
    code: str  # the changed files, from `git diff --stat`
    packages: dict[str, Pair]  # versions of the installed packages, by package name
    machine: dict[str, Pair]  # processor, library versions and settings, by name
    metrics: dict[str, Pair]  # by model and metric, such as `xz: loss`
    ratios: list[Ratio]  # one ratio for each model that A and B evaluated on the same documents
    unpaired: list[str]  # for each model without a ratio, a sentence with the reason

    def lines(self) -> list[str]:
        """Return the differences as lines for the terminal."""
        text = [f"A  {self.a}", f"B  {self.b}"]
        hashes = {path: tuple(md5 and md5[:9] for md5 in pair) for path, pair in self.data.items()}
        figures = {key: tuple(v and f"{v:.6g}" for v in pair) for key, pair in self.metrics.items()}
        for title, pairs in [
            ("parameters", self.params),
            ("data and models", hashes),
            ("packages", self.packages),
            ("machine", self.machine),
            ("metrics", figures),
        ]:
            text += ["", f"{title}:" if pairs else f"{title}: the same"]
            width = max(map(len, pairs), default=0)
            for key, pair in pairs.items():
                old, new = ("-" if value is None else value for value in pair)
                text.append(f"  {key:{width}}  {old} -> {new}")
        code = self.code.splitlines()
        text += ["", "code:" if code else "code: the same", *(f"  {line}" for line in code)]
        text += ["", "perplexity of B / perplexity of A, paired over documents (95 % interval):"]
        for one in self.ratios:
            verdict = "significant" if one.significant else "no significant difference"
            if one.low == one.high == 1.0:
                verdict = "equal"
            interval = f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f})"
            text.append(f"  {one.model}: {interval}, {one.documents:,} documents: {verdict}")
        return [*text, *(f"  {line}" for line in self.unpaired)]


def compare(first: str, second: str, root: Path) -> Difference:
    """Return the differences between two versions. `records.find_version` finds each version by its name."""
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        versions = []
        for label, name in (("a", first), ("b", second)):
            folder = Path(scratch) / label
            folder.mkdir()
            versions.append(find_version(root, name, folder))
        a, b = versions
        ratios, unpaired = _compare_in_pairs(a, b, Cache(root))
        return Difference(
            a.name,
            b.name,
            params=differing(*(flatten(parse_yaml(one.place.read(PARAMS), PARAMS)) for one in versions)),
            data=differing(_data_hashes(a), _data_hashes(b)),
            code=_changed_code(a, b, root),
            packages=changed_packages(a, b),
            machine=changed_machine(a, b),
            metrics=differing(_figures(a), _figures(b)),
            ratios=ratios,
            unpaired=unpaired,
        )


def _data_hashes(version: Version) -> dict[str, str]:
    """Return the MD5 of the corpus and of each output that is no report, by path."""
    found: dict[str, str] = {}
    for entry in version.chain.entries.values():
        found |= {path: md5 for path, md5 in outs(entry).items() if not path.startswith("reports/")}
        found |= {path: md5 for path, md5 in deps(entry).items() if path == "corpus"}
    return found


def _figures(version: Version) -> dict[str, Any]:
    """Return the losses, perplexities and bits per byte in the reports of a version, by model and metric."""
    found = {}
    for stage, entry in version.chain.entries.items():
        name, _, item = stage.partition("@")
        reports = [path for path in outs(entry) if path.endswith(".json") and name in _STAGES]
        for path in reports:
            try:
                found_here = numbers(json.loads(version.place.read(path) or "{}"))
            except (AttributeError, ValueError) as error:
                advice = "restore the file, or compare another version"
                raise BadData(f"{path} of {version.name} is not a JSON object: {advice}") from error
            for key, value in found_here.items():
                if key in _FIGURES or key.endswith(_LOSSES):
                    found[f"{item or name}: {key.removesuffix('.value')}"] = value
    return found


def _changed_code(a: Version, b: Version, root: Path) -> str:
    """Return the output of `git diff --stat` between two versions, and the files with uncommitted changes."""
    lines = []
    if a.commit and b.commit and a.commit != b.commit:
        paths = ("--", ".", ":(exclude)reports", ":(exclude)dvc.lock", ":(exclude)params.yaml")
        try:
            lines.append(git_text(root, "diff", "--stat", a.commit, b.commit, *paths))
        except UserError as error:
            lines.append(f"{a.commit[:9]}..{b.commit[:9]}: {error}")
    for version in (a, b):
        if version.diff is None:
            lines.append(f"{version.name} had uncommitted changes, and the run did not save them")
        elif version.diff and a.diff != b.diff:
            text = version.diff.decode(errors="replace").splitlines()
            names = [line.split(" b/")[-1] for line in text if line.startswith("diff --git")]
            lines.append(f"{version.name} had uncommitted changes: {', '.join(names)}")
    return "\n".join(line for line in lines if line)


def _compare_in_pairs(a: Version, b: Version, cache: Cache) -> tuple[list[Ratio], list[str]]:
    """Return the perplexity ratio of each model, and a sentence for each model that has no ratio.

    A model that only one of the two versions has is left out.
    """
    ratios, unpaired = [], []
    for path in _table_paths(a):
        if path not in _table_paths(b):
            continue
        model = Path(path).stem
        first, second = _read_table(a, cache, path), _read_table(b, cache, path)
        if first is None or second is None:
            unpaired.append(f"{model}: no per-document losses in the run's files or in DVC's cache")
        elif first.ids != second.ids or list(first.tokens) != list(second.tokens):
            unpaired.append(f"{model}: the documents of the val split are not the same")
        else:
            found = perplexity_ratio(second.nats, first.nats, second.tokens.astype(float))
            significant = not found.low <= 1.0 <= found.high
            ratios.append(Ratio(model, len(first.ids), found.value, found.low, found.high, significant))
    return ratios, unpaired


def _table_paths(version: Version) -> list[str]:
    """Return the paths of a version's tables of per-document losses, one table for each model."""
    paths = [path for entry in version.chain.entries.values() for path in outs(entry)]
    tables = [path for path in paths if path.startswith("data/baseline/")]
    return tables + (["data/evaluation/compact.parquet"] if "data/evaluation" in paths else [])


def _read_table(version: Version, cache: Cache, path: str) -> Totals | None:
    """Read a table of per-document losses from the files of a version, or from DVC's cache.

    Return None if the table is not in the files and not in the cache.
    """
    if isinstance(version.place, Folder) and (version.place.root / path).exists():
        return read_totals(version.place.root / path)
    for out, name in ((path, ""), (str(Path(path).parent), Path(path).name)):
        md5 = version.chain.out(out)
        if md5 and cache.has(md5) and name in cache.files(md5):
            return read_totals(cache.files(md5)[name])
    return None
