"""Check that the project's files match dvc.lock: `compactgpt verify`.

The command also computes the estimate, scores and rendered reports again and compares them with the files.
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.storage import MANIFEST, json_bytes, read_json
from compactgpt.config import Params, load_params
from compactgpt.evaluation.metrics import wilson
from compactgpt.evaluation.totals import figures, read_totals
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import read_sweep
from compactgpt.reporting.claims import COMPACT
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.pages import RECORD, render_files
from compactgpt.reporting.schemas import read_sources
from compactgpt.tracking.dvc_files import (
    LOCK,
    Folder,
    entries_of,
    entry_params,
    open_repo,
    outs,
    params_sha256,
    pipeline_stages,
    read_entries,
)

_SHOWN = 5  # maximum number of differences that are printed for one file
_FROM_DVC = ("data/", "models/")  # folders that `dvc pull` downloads, because git does not have them


@dataclass
class Verification:
    """What the checks found: differences, missing files, and the number of comparisons."""

    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)  # kind of comparison -> number of comparisons

    def lines(self) -> list[str]:
        """Return the results as lines for the terminal."""
        return [
            *(f"{what}: {number} checked" for what, number in self.checked.items()),
            *(f"missing, so not checked (run `dvc pull`): {path}" for path in self.unchecked),
            *([f"differs: {line}" for line in self.differences] or ["nothing differs"]),
        ]

    def count(self, what: str, number: int = 1) -> None:
        """Add `number` to the number of comparisons of the kind `what`."""
        self.checked[what] = self.checked.get(what, 0) + number

    def add_differences(self, path: str, lines: Iterable[str]) -> None:
        """Add the first `_SHOWN` differences of the file `path`, and the number of the other differences."""
        found = list(lines)
        self.differences += [f"{path}: {line}" for line in found[:_SHOWN]]
        if len(found) > _SHOWN:
            self.differences.append(f"{path}: and {len(found) - _SHOWN} more")


def verify(root: Path) -> Verification:
    """Run all checks on the project in the folder `root`.

    Raises UserError if params.yaml can't be read.
    """
    found, params = Verification(), load_params(root / "params.yaml")
    for check in (check_lock, check_params, check_estimate, check_numbers, check_renderings):
        run_check(check, root, params, found)
    found.differences = list(dict.fromkeys(found.differences))
    found.unchecked = list(dict.fromkeys(found.unchecked))
    return found


def run_check(
    check: Callable[[Path, Params, Verification], None], root: Path, params: Params, found: Verification
) -> None:
    """Run one check, which adds its results to `found`. An unreadable file counts as a difference."""
    try:
        check(root, params, found)
    except UserError as error:
        found.differences.append(str(error).replace(f"{root}/", ""))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        found.differences.append(f"a report has a wrong format ({error!r}): run `dvc repro`")


def check_lock(root: Path, _params: Params, found: Verification) -> None:
    """Compare the commands, parameters and file hashes in dvc.lock with dvc.yaml, params.yaml and the files.

    Unlike `dvc status`, read each file again, even if its time and size did not change.
    """
    entries_of(Folder(root).read(LOCK))  # raises UserError if dvc.lock has a path outside the project
    compared = set()
    with open_repo(root) as repo:
        for stage in pipeline_stages(repo):
            compared.add(stage.name)
            if stage.cmd_changed:
                found.differences.append(f"{LOCK}: {stage.name}: cmd differs from dvc.yaml: run `dvc repro`")
            for item in (*stage.deps, *stage.outs):
                compared.add(item.def_path)
                for name, state in item.workspace_status().items():
                    if isinstance(state, dict):
                        found.differences += [
                            f"{LOCK}: {stage.name}: {key} differs from params.yaml: run `dvc repro`"
                            for key in state
                        ]
                    elif state == "deleted" and name.startswith(_FROM_DVC):
                        found.unchecked.append(name)
                    else:
                        found.differences.append(
                            f"{name} is not what {LOCK} has ({state}): the file was altered, or its stage "
                            "must run again; run `dvc repro`"
                        )
    found.count("files, parameters and commands", len(compared))


def check_params(root: Path, _params: Params, found: Verification) -> None:
    """Check that `params_sha256` in each report is the hash of its stage's parameters in dvc.lock."""
    for stage, entry in read_entries(Folder(root)).items():
        for path in outs(entry):
            if not path.startswith("reports/") or not path.endswith(".json") or not (root / path).exists():
                continue
            made_with = read_json(root / path).get("params_sha256")
            found.count("parameters of reports", int(made_with is not None))
            if made_with not in (None, params_sha256(entry_params(entry))):
                found.differences.append(
                    f"{path} was made with other parameters than {LOCK} has: run `dvc repro -f {stage}`"
                )


def check_estimate(root: Path, params: Params, found: Verification) -> None:
    """Check that params.yaml and results/ladder.json give the values in reports/estimate.json."""
    path = "reports/estimate.json"
    expected = json.loads(json_bytes(estimate(params, read_sweep(root / "results/ladder.json"))))
    report = read_json(root / path)
    report.pop("params_sha256", None)
    found.add_differences(path, differences(expected, report))
    found.count("estimates")


def check_numbers(root: Path, params: Params, found: Verification) -> None:
    """Check that per-document losses and task answers give the scores in each model's report."""
    reports = {"reports/evaluation.json": f"data/evaluation/{COMPACT}.parquet"}
    reports |= {
        f"reports/baseline/{name}.json": f"data/baseline/{name}.parquet" for name in params.baseline.names
    }
    for path, table in reports.items():
        report = read_json(root / path)
        expected: dict[str, Any] = {"tasks": {}}
        for task, answers in report.get("tasks", {}).items():
            if hits := answers.get("hits", ""):
                accuracy = asdict(wilson(hits.count("1"), len(hits)))
                expected["tasks"][task] = {"accuracy": accuracy}
        if (root / table).exists():
            totals = read_totals(root / table)
            expected |= figures(totals.nats, totals)
            expected["views"] = {view: figures(nats, totals) for view, nats in totals.views.items()}
            tokens, bytes_ = int(totals.tokens.sum()), int(totals.bytes.sum())
            expected["validation"] = {"documents": len(totals.ids), "tokens": tokens, "bytes": bytes_}
        else:
            found.unchecked.append(table)
        found.add_differences(path, differences(expected, report, partial=True))
        found.count("reports of models")


def check_renderings(root: Path, params: Params, found: Verification) -> None:
    """Build reports/evidence.json again, render all files from it, and compare them with reports/.

    If inputs of evidence.json are missing, evidence.json is not checked, but the other files are.
    """
    reports = root / "reports"
    needed = ("models/compact/" + MANIFEST, "data/evaluation/compact.parquet")
    if all((root / path).exists() for path in needed):
        sources = read_sources(root, reports, root / "data", root / "models", params)
        record = json.loads(json_bytes(build_record(sources)))
    else:
        found.unchecked.append(
            f"the model or its losses, which are inputs of reports/{RECORD}. Only the files that are "
            f"rendered from {RECORD} were checked"
        )
        record = read_json(reports / RECORD)
    for name, expected in render_files(record, params.comparison.language).items():
        path = reports / name
        content = path.read_bytes() if path.exists() else b""
        if content != expected:
            cells = list(differences(record, read_json(path))) if name == RECORD and content else []
            found.add_differences(f"reports/{name}", cells or [_first_difference(expected, content)])
        found.count("renderings")


def differences(expected: Any, found: Any, *, partial: bool = False) -> Iterator[str]:
    """Yield a message for each value that differs between two JSON documents, `expected` and `found`.

    If `partial` is true, ignore values that are missing in `expected`.
    """
    want, have = _values_by_path(expected), _values_by_path(found)
    for path in want if partial else sorted({*want, *have}):
        if want.get(path) != have.get(path):
            ours, theirs = (textwrap.shorten(one.get(path, "missing"), 80) for one in (want, have))
            yield f"{path} is {theirs} in the report, but {ours} if it is calculated again from the inputs"


def _values_by_path(value: Any, path: str = "") -> dict[str, str]:
    """Return a dict: path of a value, such as `evidence[gpt2.loss].low` -> value as JSON."""
    if isinstance(value, dict):
        parts = {f"{path}.{key}" if path else key: one for key, one in value.items()}
    elif isinstance(value, list):
        names = [one.get("id", n) if isinstance(one, dict) else n for n, one in enumerate(value)]
        parts = {f"{path}[{name}]": one for name, one in zip(names, value, strict=True)}
    else:
        return {path: json.dumps(value)}
    return {inner: leaf for part, one in parts.items() for inner, leaf in _values_by_path(one, part).items()}


def _first_difference(expected: bytes, found: bytes) -> str:
    """Return a message with the number of the first line that differs.

    If `found` is empty, the message says that the file is missing.
    """
    if not found:
        return "is missing: run `dvc repro`"
    pairs = enumerate(zip_longest(expected.splitlines(), found.splitlines()), 1)
    number = next((n for n, (one, other) in pairs if one != other), 1)  # 1 if only line endings differ
    return f"line {number} differs from a new rendering of this file: run `dvc repro`"
