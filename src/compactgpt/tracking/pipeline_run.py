"""The MLflow run of one `dvc` process: the stages that ran, the stages that DVC skipped, and the run's files.

If DVC skips a stage or takes it from its run cache, no stage script runs and no journal exists. So `outcome`
reads dvc.lock after the `dvc` process has ended. The run gets the outputs of the stages that ran. It gets a
skipped stage's outputs only if the entry in dvc.lock has the run's parameters, code and data.
"""

import csv
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compactgpt.common.errors import UserError
from compactgpt.common.storage import MANIFEST, read_json
from compactgpt.tracking import dvc_files, journal
from compactgpt.tracking.dvc_files import LOCK, MODEL, PARAMS, TOKENS, Cache, Chain, Entry, Folder, Place
from compactgpt.tracking.journal import BEFORE, JournalFile, flatten

MAX_TABLE = 20_000_000  # bytes; a larger table of per-document losses is not saved with the run
OUTCOME = "outcome.json"
SKIPPED, NOT_REACHED = "skipped", "not reached"


class Outcome(BaseModel):
    """The outcome of a `dvc` process, saved as OUTCOME in the folder `after/`."""

    status: str  # MLflow's run status
    reason: str = ""  # why the run is incomplete
    stages: dict[str, str] = {}  # ran, skipped or not reached
    entries: dict[str, str] = {}  # hash of a stage's entry in dvc.lock, if the entry belongs to the run


def outcome(
    place: Place, before: Place, journals: list[JournalFile], command: str, tree: Path | None = None
) -> Outcome:
    """Return the outcome of a `dvc` process: its status, and what happened to each stage.

    Args:
        place: the files after the `dvc` process: the work tree, or the commit of a DVC experiment.
        before: the files before the first stage.
        journals: the journals of the stages that ran.
        command: the `dvc` command. If it names stages, the other stages need no results.
        tree: the work tree, whose code and data the results must belong to; None for a commit.
    """
    try:
        chain, old = dvc_files.read_chain(place), dvc_files.entries_of(before.read(LOCK))
        params = flatten(dvc_files.parse_yaml(before.read(PARAMS) or place.read(PARAMS), PARAMS))
    except UserError as error:
        return Outcome(status="FAILED", reason=str(error))
    ran = {file.start["stage"]: file for file in journals}
    found = Outcome(status="FINISHED")
    for stage in chain.stages:  # in dvc.yaml, a stage comes after the stages that it depends on
        found.stages[stage] = f"ran ({ran[stage].status.lower()})" if stage in ran else NOT_REACHED
        if not (entry := chain.entries.get(stage)):
            continue
        if stage in ran:
            is_valid = ran[stage].status == "FINISHED" and _is_recorded(ran[stage], entry)
        elif is_valid := _has_params(entry, params) and _has_inputs(entry, chain, found.entries, tree):
            same = old.get(stage) == entry
            found.stages[stage] = f"{SKIPPED}: {'unchanged' if same else 'from the run cache of DVC'}"
        if is_valid:
            found.entries[stage] = dvc_files.entry_key(entry)
    named = [stage for stage in chain.stages if {stage, stage.partition("@")[0]} & set(command.split())]
    if missing := [stage for stage in named or chain.stages if stage not in found.entries]:
        found.reason = f"`dvc` failed or was stopped: {LOCK} has no results for {', '.join(missing)}"
    if not chain.lock:
        found.reason = f"{LOCK} is empty or missing"
    ends = [*(file.status for file in journals), "FAILED" if found.reason else "FINISHED"]
    found.status = next(status for status in ("KILLED", "FAILED", "FINISHED") if status in ends)
    return found


def _is_recorded(file: JournalFile, entry: Entry) -> bool:
    """Return whether the reports that a stage logged have the hashes in dvc.lock."""
    named = {Path(path).name: md5 for path, md5 in dvc_files.outs(entry).items()}
    logged = {path.name: dvc_files.md5_file(path) for path in (file.folder / "artifacts/reports").glob("*")}
    return all(named.get(name, md5) == md5 for name, md5 in logged.items())


def _has_params(entry: Entry, params: Mapping[str, Any]) -> bool:
    """Return whether a stage's entry has these parameters."""
    wanted = dvc_files.entry_params(entry)
    found = {
        key: value
        for key, value in params.items()
        if any(dvc_files.is_inside(key, one, ".") for one in wanted)
    }
    return flatten(wanted) == found


def _has_inputs(entry: Entry, chain: Chain, valid: Mapping[str, str], tree: Path | None) -> bool:
    """Return whether a stage's dependencies are outputs of valid stages, or code and data of this version."""
    makers = {out: stage for stage, one in chain.entries.items() for out in dvc_files.outs(one)}
    for path, md5 in dvc_files.deps(entry).items():
        inside = [out for out in makers if dvc_files.overlap(out, path)]
        if any(makers[out] not in valid for out in inside) or chain.out(path) not in ("", md5):
            return False
        # DVC commits only experiments that succeeded. In the work tree a missing file counts as changed.
        if not inside and tree and dvc_files.md5_path(tree / path) != md5:
            return False
    return True


def write_after(
    place: Place, cache: Cache, run_folder: Path, journals: list[JournalFile], command: str, tree: Path
) -> None:
    """Save the files of an ended `dvc` process to `after/`, before the next command changes them.

    `after/` has the new dvc.lock, the other files of `before/`, the list of installed packages, and the run's
    reports and small tables of per-document losses. OUTCOME says which stages belong to the run.
    """
    before, after, making = (run_folder / name for name in (BEFORE, "after", "after.tmp"))
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    if before.exists():  # a first stage that was killed at once, or whose disk was full, has kept none
        kept = shutil.ignore_patterns(LOCK)
        shutil.copytree(before, making, ignore=kept, dirs_exist_ok=True)  # with modes: changes stay private
    if lock := place.read(LOCK):
        (making / LOCK).write_bytes(lock)
    (making / "environment").mkdir()
    (making / "environment/packages.txt").write_text(journal.packages())
    found = outcome(place, Folder(before), journals, command, tree if isinstance(place, Folder) else None)
    try:
        for path, md5 in outs(place, found).items():
            is_table = path.startswith(("data/evaluation", "data/baseline")) and cache.has(md5)
            size = sum(file.stat().st_size for file in cache.files(md5).values()) if is_table else 0
            if path.startswith("reports/") or (is_table and size <= MAX_TABLE):
                dvc_files.checkout(cache, place, path, md5, making / path)
    except UserError as error:  # a file in DVC's cache was altered
        found.reason = found.reason or str(error)
    (making / OUTCOME).write_text(found.model_dump_json())
    shutil.rmtree(after, ignore_errors=True)
    making.rename(after)


def outs(place: Place, found: Outcome) -> dict[str, str]:
    """Return the MD5 of each output that belongs to a run."""
    entries = dvc_files.read_chain(place).entries if found.entries else {}
    return {path: md5 for stage in found.entries for path, md5 in dvc_files.outs(entries[stage]).items()}


def skipped_metrics(after: Path, found: Outcome) -> Iterator[dict[str, Any]]:
    """Yield the metrics of valid stages that DVC skipped, read from their reports, as journal lines."""
    for stage in found.entries:
        name, _, item = stage.partition("@")
        path = after / "reports" / (f"baseline/{item}.json" if item else f"{name}.json")
        if not found.stages[stage].startswith(SKIPPED) or not path.exists():
            continue
        yield {"kind": "metrics", "step": 0, "values": journal.stage_metrics(stage, read_json(path))}
        curve = after / "reports/loss.csv"
        if name == "training" and curve.exists():
            for row in csv.DictReader(curve.read_text(encoding="utf-8").splitlines()):
                losses = {"train/loss": row.get("train_loss"), "val/loss": row.get("val_loss")}
                values = {key: float(value) for key, value in losses.items() if value}
                yield {"kind": "metrics", "step": int(row["step"]), "values": values}


def hashes(after: Path, cache: Cache, made: Mapping[str, str]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the SHA-256 of dvc.lock and of the weights as tags, and the token files for `Journal.inputs`."""
    tags, datasets = {"lock_sha256": hashlib.sha256(Folder(after).read(LOCK) or b"").hexdigest()}, []
    for path in (TOKENS, MODEL):
        md5 = made.get(path, "")
        if md5 and cache.has(md5) and (manifest := cache.files(md5).get(MANIFEST)):
            files = read_json(manifest)["files"]
            if weights := files.get("model.safetensors"):
                tags["weights_sha256"] = weights["sha256"]
            datasets += journal.token_files(files, {"train": "training", "val": "validation"})
    return tags, datasets


def description(command: str, found: Outcome, links: Mapping[str, str]) -> str:
    """Return a run's description in Markdown. `links` has, for each stage, a link to the run that ran it."""
    lines = [f"`{command}`", "", *([f"**{found.reason}**", ""] if found.reason else [])]
    lines += ["| stage | here | made by |", "| --- | --- | --- |"]
    for stage, what in found.stages.items():
        made_by = "" if what == NOT_REACHED else links.get(stage, "no run known here")
        lines.append(f"| {stage} | {what} | {made_by} |")
    return "\n".join(lines)
