"""What a stage reads, and how far the pipeline is: for the stage scripts.

DVC hashes parameters and dependencies after a stage's command. If a parameter or a file changes while the
stage runs, DVC records values that the stage did not use (treeverse/dvc#11058). So a stage compares its
parameters and dependencies at its end with those at its start, and fails if their content differs.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, CheckFailed, UserError
from compactgpt.common.storage import json_bytes, read_json
from compactgpt.tracking.dvc_files import (
    PARAMS,
    Chain,
    Folder,
    entry_params,
    is_ignored,
    md5_path,
    overlap,
    parse_yaml,
    read_chain,
    read_stages,
    values_at,
)
from compactgpt.tracking.journal import JournalFile, flatten, tracking_folder

ESTIMATED_ON = "two-cpu-cores"  # the machine of reports/estimate.json whose time stands for this machine
MAX_HASHED = 2_000_000_000  # bytes: about four seconds
_LARGE = ("data/", "models/")  # outputs of stages: their hashes are in dvc.lock
Listing = set[tuple[str, int, int]]  # path, size and time of each file


@dataclass(frozen=True)
class Inputs:
    """The parameters and the files that a stage reads, as they were when the stage started."""

    stage: str
    root: Path
    params: dict[str, Any]  # by the keys that dvc.yaml names, as DVC writes them to dvc.lock
    files: dict[str, tuple[Listing, str]]  # the files and the MD5 of each dependency, by path

    def require_unchanged(self) -> None:
        """Check that the parameters and the content of the dependencies are the same now.

        dvc.yaml and dvc.lock are not read again: DVC has read dvc.yaml already, and another `dvc` process may
        be writing dvc.lock. A file is read again only if its size or time has changed.

        Raises:
            CheckFailed: a parameter or a dependency changed. The stage fails, so that DVC records nothing.
        """
        try:
            old, new = flatten(self.params), flatten(values_at(_params(self.root), [*self.params]))
            keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            changed = [f"{key} ({old.get(key)} -> {new.get(key)})" for key in keys]
        except UserError:
            changed = [f"{PARAMS} (not valid YAML now)"]
        for name, (listing, md5) in self.files.items():
            path = self.root / name
            if _list_files(path) != listing and md5_path(path) != md5:
                changed.append(name)
        if changed:
            raise CheckFailed(
                f"changed while {self.stage} ran: {', '.join(changed[:5])}. The results are of the earlier "
                "version, so DVC must not record them: run `dvc repro` again, or restore the earlier version "
                f"and keep these results with `dvc commit -f {self.stage}`"
            )


def read_inputs(root: Path, stage: str) -> tuple[Inputs, Chain]:
    """Return the inputs of a stage, and all stages. A stage that dvc.yaml does not have has no inputs.

    The files are listed only if DVC runs the stage. The MD5 of an output of another stage comes from
    dvc.lock. The MD5 of other files is computed, but it is empty for more than MAX_HASHED bytes.
    """
    try:
        chain = read_chain(Folder(root))
    except BadData:  # another `dvc` process may be writing dvc.lock
        chain = Chain(read_stages(Folder(root)), {})
    if stage not in chain.stages:
        return Inputs(stage, root, {}, {}), chain
    files = {}
    for name in chain.stages[stage].deps if "DVC_STAGE" in os.environ else []:
        listing, md5 = _list_files(root / name), chain.out(name) if name.startswith(_LARGE) else ""
        if not md5 and sum(size for _, size, _ in listing) <= MAX_HASHED:
            md5 = md5_path(root / name)
        files[name] = (listing, md5)
    return Inputs(stage, root, values_at(_params(root), chain.stages[stage].params), files), chain


def _params(root: Path) -> dict[str, Any]:
    return parse_yaml(Folder(root).read(PARAMS), PARAMS)


def _list_files(path: Path) -> Listing:
    found = [path] if path.is_file() else []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not is_ignored(name)]
        found += [Path(folder, name) for name in names if not is_ignored(name)]
    listing = set()
    for file in found:
        with suppress(OSError):  # a link to no file or to itself, or a file that was just deleted
            status = file.stat()
            listing.add((str(file), status.st_size, status.st_mtime_ns))
    return listing


def params_sha256(params: Mapping[str, Any]) -> str:
    """Return the hash of a stage's parameters, as dvc.lock has them."""
    return hashlib.sha256(json_bytes(params)).hexdigest()


def describe_position(chain: Chain, root: Path, stage: str, state: Path) -> str:
    """Return which of all stages this one is, and about how long it and the later stages take.

    The times are those of each stage's last run on this machine, which its journal has.
    """
    number, later = [*chain.stages].index(stage), _stages_to_run(chain, root, stage)
    found = [_last_seconds(state, one) or _forecast(root, one) for one in later]
    known = sum(found)
    amount = f"{known / 60:,.0f} min" if known > 90 else f"{known:.0f} s"
    left = f", {'about' if all(found) else 'more than'} {amount} left" if known >= 1 else ""
    return f"stage {number + 1} of {len(chain.stages)}: {stage}{left}"


def _stages_to_run(chain: Chain, root: Path, first: str) -> list[str]:
    """Return a stage, and the later stages that DVC will run after it."""
    stages, written, tree = [first], [*chain.stages[first].outs], _params(root)
    for name in [*chain.stages][[*chain.stages].index(first) + 1 :]:
        stage, entry = chain.stages[name], chain.entries.get(name)
        # A JSON file in data/ says only that a check passed, so it stays the same.
        reads = [path for path in stage.deps if not (path.startswith("data/") and path.endswith(".json"))]
        depends = any(overlap(path, out) for path in reads for out in written)
        if depends or not entry or entry_params(entry) != values_at(tree, stage.params):
            stages.append(name)
            written += stage.outs
    return stages


def _last_seconds(state: Path, stage: str) -> float:
    """Return the duration in seconds of a stage's last complete run in this project; 0.0 if it has none."""
    folders = sorted(tracking_folder(state.parent).glob(f"*/*-{stage}-*"), key=lambda folder: folder.name)
    for journal in map(JournalFile, reversed(folders)):
        if journal.path.exists() and journal.start.get("stage") == stage:
            first, last = journal.start, journal.last
            if last.get("status") == "FINISHED" and "continues" not in first:
                return max(0.0, float(last["time_ms"] - first["time_ms"]) / 1000)
    return 0.0


def _forecast(root: Path, stage: str) -> float:
    """Return the seconds that reports/estimate.json has for training; 0.0 for every other stage."""
    path = root / "reports/estimate.json"
    if stage == "training" and path.exists():
        with suppress(UserError, LookupError, TypeError):  # a damaged report is no reason to fail
            return float(read_json(path)["compact"]["minutes"][ESTIMATED_ON]) * 60
    return 0.0
