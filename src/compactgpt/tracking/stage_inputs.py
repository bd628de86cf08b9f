"""The inputs of a stage, and how far the pipeline is: for the stage scripts.

DVC hashes parameters and dependencies after a stage's command. If a parameter or a file changes while the
stage runs, DVC records values that the stage did not use (treeverse/dvc#11058). So a stage compares its
inputs at its end with its inputs at its start, and fails if they differ.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import CheckFailed, UserError
from compactgpt.common.storage import json_bytes, read_json
from compactgpt.tracking.dvc_files import (
    PARAMS,
    Folder,
    is_ignored,
    md5_path,
    parse_yaml,
    read_stages,
    values_at,
)
from compactgpt.tracking.journal import JournalFile, flatten, tracking_folder

ESTIMATED_ON = "two-cpu-cores"  # the machine of reports/estimate.json whose time stands for this machine
_LARGE = ("corpus", "data", "models")


@dataclass(frozen=True)
class Inputs:
    """The parameters and dependencies of a stage, as they were when the stage started."""

    stage: str
    params: dict[str, Any]  # by the keys that dvc.yaml names, as DVC writes them to dvc.lock
    files: dict[str, Any]  # by path: the MD5 of a dependency, or the sizes and times of its files

    def require_unchanged(self) -> None:
        """Raise CheckFailed if a parameter or a dependency is not the same now. Then DVC records nothing."""
        try:
            old, new = flatten(self.params), flatten(values_at(_params(), [*self.params]))
            keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            changed = [f"{key} ({old.get(key)} -> {new.get(key)})" for key in keys]
        except UserError:
            changed = [f"{PARAMS} (not valid YAML now)"]
        changed += [path for path, state in self.files.items() if _file_state(path) != state]
        if changed:
            raise CheckFailed(
                f"changed while {self.stage} ran: {', '.join(changed[:5])}. The results are of the earlier "
                "version, so DVC must not record them: run `dvc repro` again, or restore the earlier version "
                f"and keep these results with `dvc commit -f {self.stage}`"
            )


def read_inputs(stage: str) -> tuple[Inputs, list[str]]:
    """Return the inputs of a stage, and the names of all stages in the order of dvc.yaml.

    Dependencies are read only if DVC runs the stage. A stage that dvc.yaml does not have has no inputs.
    """
    stages = read_stages(Folder(Path()))
    if stage not in stages:
        return Inputs(stage, {}, {}), []
    paths = stages[stage].deps if "DVC_STAGE" in os.environ else []
    files = {path: _file_state(path) for path in paths}
    return Inputs(stage, values_at(_params(), stages[stage].params), files), [*stages]


def _params() -> dict[str, Any]:
    return parse_yaml(Folder(Path()).read(PARAMS), PARAMS)


def _file_state(path: str) -> Any:
    """Return the MD5 of code or a report. Data can have gigabytes: return the size and time of each file."""
    if path.partition("/")[0] not in _LARGE:
        return md5_path(Path(path))
    state = set()
    for file in [Path(path), *Path(path).rglob("*")]:
        with suppress(OSError):  # a link to no file or to itself, or a file that was just deleted
            if file.is_file() and not any(map(is_ignored, file.parts)):
                state.add((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return state


def params_sha256(params: Mapping[str, Any]) -> str:
    """Return the hash of a stage's parameters, as dvc.lock has them."""
    return hashlib.sha256(json_bytes(params)).hexdigest()


def describe_position(stages: list[str], stage: str, state: Path) -> str:
    """Return the number of a stage, and how long it and all later stages took in their last runs here."""
    position = stages.index(stage)
    seconds = sum(_last_seconds(state, one) or _forecast(one) for one in stages[position:])
    left = f", about {seconds / 60:,.0f} min left if every later stage runs" if seconds >= 30 else ""
    return f"stage {position + 1} of {len(stages)}: {stage}{left}"


def _last_seconds(state: Path, stage: str) -> float:
    """Return the duration of a stage's last complete run in this project; 0.0 if it has none."""
    paths = tracking_folder(state.parent).glob(f"*/*-{stage}-*/journal.jsonl")
    for folder in sorted((path.parent for path in paths), key=lambda folder: folder.name, reverse=True):
        journal = JournalFile(folder)
        first, last = journal.start, journal.last
        if first.get("stage") == stage and last.get("status") == "FINISHED" and "continues" not in first:
            return max(0.0, float(last["time_ms"] - first["time_ms"]) / 1000)
    return 0.0


def _forecast(stage: str) -> float:
    """Return the seconds that reports/estimate.json has for training; 0.0 for every other stage."""
    if stage == "training":
        with suppress(UserError, LookupError, TypeError):  # a missing or damaged report stops no stage
            return float(read_json(Path("reports/estimate.json"))["compact"]["minutes"][ESTIMATED_ON]) * 60
    return 0.0
