"""Compare two versions of the project: parameters, data, code, packages, machine and metrics."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, UserError
from compactgpt.common.git import git_text
from compactgpt.evaluation.metrics import Interval, perplexity_ratio
from compactgpt.evaluation.totals import Totals, read_totals
from compactgpt.tracking.dvc_files import LOCK, PARAMS, Cache, Folder, all_outs, deps, outs, parse_yaml
from compactgpt.tracking.journal import flatten, numbers
from compactgpt.tracking.records import Pair, Version, changed_environment, differing, find_version

_STAGES = ("training", "evaluation", "baseline")  # the stages whose metrics are compared
# A number in a report is compared if its key is in _FIGURES or ends in one of _LOSSES.
_FIGURES = ("loss.value", "perplexity.value", "bits_per_byte.value")
_LOSSES = ("train_loss", "val_loss")


@dataclass(frozen=True)
class Difference:
    """The differences between versions A and B. A `Pair` has the value in A and the value in B."""

    a: str  # the name of version A
    b: str  # the name of version B
    params: dict[str, Pair]  # dotted key in params.yaml -> the values in A and B
    data: dict[str, Pair]  # path of the corpus or of an output -> the MD5 in A and in B
    code: str  # the result of `_changed_code`; empty if no file differs
    environment: dict[str, Pair]  # package or machine fact -> the values in A and B
    metrics: dict[str, Pair]  # model and metric, such as `xz: loss` -> the values in A and B
    ratios: dict[str, Interval]  # model -> perplexity in B / perplexity in A, on the same documents
    unpaired: list[str]  # a sentence for each model of both A and B that has no ratio: why

    def lines(self) -> list[str]:
        """Return the differences as lines for the terminal."""
        text = [f"A  {self.a}", f"B  {self.b}"]
        hashes = {path: tuple(md5 and md5[:9] for md5 in pair) for path, pair in self.data.items()}
        figures = {key: tuple(v and f"{v:.6g}" for v in pair) for key, pair in self.metrics.items()}
        for title, pairs in [
            ("parameters", self.params),
            ("data and models", hashes),
            ("packages and machine", self.environment),
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
        for model, ratio in self.ratios.items():
            verdict = "no significant difference" if ratio.low <= 1.0 <= ratio.high else "significant"
            text.append(f"  {model}: {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f}): {verdict}")
        return [*text, *(f"  {line}" for line in self.unpaired)]


def compare(first: str, second: str, root: Path) -> Difference:
    """Return the differences between two versions. `first` and `second` are names for `find_version`."""
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        a, b = find_version(root, first, Path(scratch)), find_version(root, second, Path(scratch))
        ratios, unpaired = _compare_in_pairs(a, b, Cache(root))
        return Difference(
            a.name,
            b.name,
            params=differing(_params(a), _params(b)),
            data=differing(_data_hashes(a), _data_hashes(b)),
            code=_changed_code(a, b, root),
            environment=changed_environment(a, b),
            metrics=differing(_figures(a), _figures(b)),
            ratios=ratios,
            unpaired=unpaired,
        )


def _params(version: Version) -> dict[str, Any]:
    return flatten(parse_yaml(version.place.read(PARAMS), PARAMS))


def _data_hashes(version: Version) -> dict[str, str]:
    """Return the MD5 hashes of the corpus and of all outputs except reports, by path."""
    found = {path: md5 for path, md5 in all_outs(version.entries).items() if not path.startswith("reports/")}
    for entry in version.entries.values():
        found |= {path: md5 for path, md5 in deps(entry).items() if path == "corpus"}
    return found


def _figures(version: Version) -> dict[str, Any]:
    """Return the metrics in a version's reports: model and metric, such as `xz: loss` -> value."""
    found = {}
    for stage, entry in version.entries.items():
        name, _, item = stage.partition("@")
        for path in (path for path in outs(entry) if path.endswith(".json") and name in _STAGES):
            try:
                values = numbers(json.loads(version.place.read(path) or "{}"))
            except (AttributeError, ValueError) as error:
                advice = "restore the file, or compare another version"
                raise BadData(f"{path} of {version.name} is not a JSON object: {advice}") from error
            for key, value in values.items():
                if key in _FIGURES or key.endswith(_LOSSES):
                    found[f"{item or name}: {key.removesuffix('.value')}"] = value
    return found


def _changed_code(a: Version, b: Version, root: Path) -> str:
    """Return the output of `git diff --stat`, and a line with the uncommitted files of each version."""
    lines = []
    if a.commit and b.commit and a.commit != b.commit:
        other = [f":(exclude){name}" for name in ("reports", "*.dvc", LOCK, PARAMS)]
        try:
            lines.append(git_text(root, "diff", "--stat", a.commit, b.commit, "--", ".", *other))
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


def _compare_in_pairs(a: Version, b: Version, cache: Cache) -> tuple[dict[str, Interval], list[str]]:
    """Return the values of `Difference.ratios` and `Difference.unpaired`."""
    ratios, unpaired = {}, []
    first, second = _read_losses(a, cache), _read_losses(b, cache)
    for model in (name for name in first if name in second):
        old, new = first[model], second[model]
        if old is None or new is None:
            lacking = [version.name for version, losses in ((a, old), (b, new)) if losses is None]
            unpaired.append(
                f"{model}: no ratio, because DVC's cache lacks the losses per document of "
                f"{' and '.join(lacking)}: run `dvc pull`, or compare versions that ran in this folder"
            )
        elif old.ids != new.ids or list(old.tokens) != list(new.tokens):
            unpaired.append(f"{model}: no ratio, because the documents of the val split differ")
        else:
            ratios[model] = perplexity_ratio(new.nats, old.nats, new.tokens.astype(float))
    return ratios, unpaired


def _read_losses(version: Version, cache: Cache) -> dict[str, Totals | None]:
    """Return model -> losses per document; None for a model without losses on disk or in DVC's cache."""
    found: dict[str, Totals | None] = {}
    for out, md5 in all_outs(version.entries).items():
        if out != "data/evaluation" and not out.startswith("data/baseline/"):
            continue
        # data/evaluation is a folder with a parquet file. The outputs in data/baseline are parquet files.
        name = "compact.parquet" if out == "data/evaluation" else ""
        path = Path(out, name)
        if isinstance(version.place, Folder) and (version.place.root / path).exists():
            found[path.stem] = read_totals(version.place.root / path)
        else:
            found[path.stem] = read_totals(cache.files(md5)[name]) if cache.has(md5) else None
    return found
