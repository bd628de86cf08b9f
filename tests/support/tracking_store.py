"""An empty MLflow store, a small repository under DVC's files, and journals: for the tests of lineage."""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil

from compactgpt.tracking.dvc_files import md5_of, md5_path
from compactgpt.tracking.journal import Journal, process_facts
from compactgpt.tracking.mlflow_logger import Logger
from compactgpt.tracking.run_folder import run_folders
from compactgpt.tracking.store import open_store

IDENTITY = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def made_store(folder: Path) -> bytes:
    """Make a migrated, empty store: it takes seconds, copying it none."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    open_store(folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return (folder / "mlflow.db").read_bytes()


def git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **IDENTITY},
    )
    return done.stdout.strip()


def journal(root: Path, stage: str = "training", *, held=False, **start) -> Journal:
    facts = {"tags": {}, "workspace": str(root), **process_facts(), **start}
    run = Journal(root / ".state", stage, facts, held=held)
    run.keep_before(Path(facts["workspace"]))
    return run


def copy(root: Path) -> bool:
    """Copy every run folder to its store, as the child processes do; whether all are complete."""
    done = []
    for folder in run_folders(root):
        folder.keep_after()
        done.append(Logger(folder, open_store(root, folder.start["store"])).copy())
    return all(done)


def runs(root: Path):
    store = open_store(root)
    return store.client.search_runs([store.experiment], order_by=["attributes.start_time"])


def cache_out(root: Path, path: str) -> str:
    """Put an out into DVC's cache as DVC does; returns its name."""

    def keep(content: bytes, suffix: str = "") -> str:
        md5 = md5_of(content) + suffix
        target = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return md5

    place = root / path
    if place.is_file():
        return keep(place.read_bytes())
    files = sorted(found for found in place.rglob("*") if found.is_file())
    listing = [{"md5": keep(one.read_bytes()), "relpath": one.relative_to(place).as_posix()} for one in files]
    made = keep(json.dumps(listing, sort_keys=True).encode(), ".dir")
    assert made == md5_path(place)
    return made


def save_lock(
    root: Path, stages: dict[str, list[str]], deps: dict[str, list[str]] | None = None, **params
) -> None:
    """Write a dvc.lock of stages with their outs, as they lie there."""
    entries = {
        stage: {
            "cmd": f"make {stage}",
            "params": {"params.yaml": params},
            "deps": [named(root, path) for path in (deps or {}).get(stage, [])],
            "outs": [named(root, path) for path in paths],
        }
        for stage, paths in stages.items()
    }
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": entries}))  # JSON is YAML


def named(root: Path, path: str) -> dict[str, str]:
    return {"path": path, "hash": "md5", "md5": md5_path(root / path)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ended_dvc() -> dict:
    """A process that stands for `dvc`, and has ended when the journals are read."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "command": "dvc repro"}
    child.communicate(b"\n")
    return facts


def stage_statuses(run) -> dict[str, tuple[str, str]]:
    """Return what a pipeline run says of each stage: its status and the run that made its outs."""
    rows = [line.split(" | ") for line in run.data.tags["mlflow.note.content"].splitlines() if " | " in line]
    return {row[0].strip("| "): (row[1], row[2].strip("| ")) for row in rows[2:]}
