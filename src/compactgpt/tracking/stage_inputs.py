"""What a stage reads, and how far the pipeline is: for the stage scripts.

DVC hashes parameters and dependencies after a stage's command. If one of them changes while the stage runs,
DVC would record values that the stage did not use (treeverse/dvc#11058). So a stage compares both moments.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import CheckFailed
from compactgpt.common.storage import json_bytes, read_json
from compactgpt.tracking.dvc_files import CODE, Chain, Folder, entry_params, md5_path, overlap, read_chain
from compactgpt.tracking.journal import JournalFile, flatten, tracking_folder

ESTIMATED_ON = "two-cpu-cores"  # the machine of reports/estimate.json whose time stands for this machine


@dataclass(frozen=True)
class Inputs:
    """The parameters and the files that a stage reads, at one moment."""

    stage: str
    params: dict[str, Any]  # by the keys that dvc.yaml names, as DVC writes them to dvc.lock
    files: dict[str, Any]  # a description of each dependency, by path

    def require_unchanged(self, root: Path) -> None:
        """Check that the stage would read the same now.

        Raises:
            CheckFailed: a parameter or a dependency changed. The stage fails, so that DVC records nothing.
        """
        now = read_inputs(read_chain(Folder(root)), root, self.stage)
        old, new = flatten(self.params), flatten(now.params)
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        changed = [f"{key} ({old.get(key)} -> {new.get(key)})" for key in keys]
        changed += [path for path, files in self.files.items() if now.files.get(path) != files]
        if changed:
            raise CheckFailed(
                f"changed while {self.stage} ran: {', '.join(changed[:5])}. The results are of the earlier "
                "version, so DVC must not record them: run `dvc repro` again, or restore the earlier version "
                f"and keep these results with `dvc commit -f {self.stage}`"
            )


def read_inputs(chain: Chain, root: Path, stage: str) -> Inputs:
    """Return what a stage of dvc.yaml reads now; nothing for a stage that dvc.yaml does not have.

    Code is described by its hash, so that a file saved without a change is the same. Data may be large, and
    is described by the name, size and time of each file.
    """
    paths = chain.deps.get(stage, [])
    code = {path: md5_path(root / path) for path in paths if path.startswith(CODE)}
    data = {path: sorted(_list_files(root / path)) for path in paths if path not in code}
    return Inputs(stage, chain.params.get(stage, {}), code | data)


def _list_files(path: Path) -> Iterator[tuple[str, int, int]]:
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in found if path.is_dir() else [path]:
        if file.exists():
            status = file.stat()
            yield str(file), status.st_size, status.st_mtime_ns


def params_sha256(params: Mapping[str, Any]) -> str:
    """Return the hash of a stage's parameters, as dvc.lock has them."""
    return hashlib.sha256(json_bytes(params)).hexdigest()


def describe_position(chain: Chain, root: Path, stage: str, state: Path) -> str:
    """Return which of all stages this one is, and about how long it and the later stages take.

    The times are those of each stage's last run on this machine, which its journal has.
    """
    number = chain.stages.index(stage)
    found = [_last_seconds(state, later) or _forecast(root, later) for later in _stages_to_run(chain, number)]
    known = sum(found)
    amount = f"{known / 60:,.0f} min" if known > 90 else f"{known:.0f} s"
    left = f", {'about' if all(found) else 'more than'} {amount} left" if known else ""
    return f"stage {number + 1} of {len(chain.stages)}: {stage}{left}"


def _stages_to_run(chain: Chain, number: int) -> list[str]:
    """Return the stage at a position, and the later stages that DVC will run after it."""
    stages = [chain.stages[number]]
    for stage in chain.stages[number + 1 :]:
        entry = chain.entries.get(stage)
        written = [out for earlier in stages for out in chain.outs[earlier]]
        # A JSON file in data/ says only that a check passed, so it stays the same.
        reads = [
            path for path in chain.deps[stage] if not (path.startswith("data/") and path.endswith(".json"))
        ]
        depends = any(overlap(path, out) for path in reads for out in written)
        if depends or not entry or entry_params(entry) != chain.params[stage]:
            stages.append(stage)
    return stages


def _last_seconds(state: Path, stage: str) -> float:
    """Return how long a stage took when it last ran here from beginning to end; 0.0 if it never did."""
    folders = sorted(tracking_folder(state.parent).glob(f"*/*-{stage}-*"), key=lambda folder: folder.name)
    for journal in map(JournalFile, reversed(folders)):
        if journal.path.exists() and journal.start.get("stage") == stage:
            first, last = journal.start, journal.last
            if last.get("status") == "FINISHED" and "continues" not in first:
                return float(last["time_ms"] - first["time_ms"]) / 1000
    return 0.0


def _forecast(root: Path, stage: str) -> float:
    """Return the seconds that reports/estimate.json has for training; 0.0 for every other stage."""
    path = root / "reports/estimate.json"
    if stage != "training" or not path.exists():
        return 0.0
    return float(read_json(path)["compact"]["minutes"].get(ESTIMATED_ON, 0.0)) * 60
