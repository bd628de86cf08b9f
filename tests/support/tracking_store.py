"""An MLflow store, a project with the files that DVC writes, and journals, for the tests of tracking."""

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
from compactgpt.tracking.pipeline_run import run_folders
from compactgpt.tracking.store import open_store
from tests.support import dvc_projects


def made_store(folder: Path) -> bytes:
    """Return the content of a new mlflow.db. To create one takes seconds, to copy it no time."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    open_store(folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return (folder / "mlflow.db").read_bytes()


def enter_project(root: Path, store: bytes, monkeypatch, stages: str = "{}") -> Path:
    """Create a project with an empty store, and make it the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root.mkdir(parents=True, exist_ok=True)
    (root / "mlflow.db").write_bytes(store)
    (root / "dvc.yaml").write_text(f"stages: {stages}")
    monkeypatch.chdir(root)
    return root


def git(root: Path, *words: str) -> str:
    return dvc_projects.git(root, *words).strip()


def journal(root: Path, stage: str = "training", **start) -> Journal:
    """Open a stage's journal, as the stage's script does."""
    facts = {"tags": {}, "workspace": str(root), **process_facts(), **start}
    run = Journal(root / ".state", stage, facts)
    run.keep_before(Path(facts["workspace"]))
    return run


def copy(root: Path) -> bool:
    """Copy every run folder to its store, as the child processes do. Return whether all are complete."""
    loggers = [Logger(folder, open_store(root, folder.start["store"])) for folder in run_folders(root)]
    done = [logger.copy() for logger in loggers]
    for logger in loggers:
        logger.close()
    return all(done)


def runs(root: Path, stage: str = "") -> list:
    """Return the runs of a stage, or of all stages, the oldest run first."""
    store = open_store(root)
    found = store.client.search_runs([store.experiment], order_by=["attributes.start_time"])
    return [run for run in found if stage in ("", run.data.tags["stage"])]


def history(root: Path, run, key: str) -> list:
    """Return the pairs (step, value) of a metric."""
    points = open_store(root).client.get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def cache_out(root: Path, path: str) -> str:
    """Copy an output to DVC's cache as DVC does, and return its MD5."""

    def keep(content: bytes, suffix: str = "") -> str:
        md5 = md5_of(content) + suffix
        target = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return md5

    out = root / path
    if out.is_file():
        return keep(out.read_bytes())
    files = sorted(found for found in out.rglob("*") if found.is_file())
    listing = [{"md5": keep(one.read_bytes()), "relpath": one.relative_to(out).as_posix()} for one in files]
    md5 = keep(json.dumps(listing, sort_keys=True).encode(), ".dir")
    assert md5 == md5_path(out)
    return md5


def save_lock(
    root: Path, stages: dict[str, list[str]], deps: dict[str, list[str]] | None = None, **params
) -> None:
    """Write dvc.lock for stages (name -> outputs), and copy outputs outside of reports/ to DVC's cache."""

    def named(path: str) -> dict[str, str]:
        return {"path": path, "hash": "md5", "md5": md5_path(root / path)}

    for path in (path for paths in stages.values() for path in paths if not path.startswith("reports/")):
        cache_out(root, path)
    entries = {
        stage: {
            "cmd": f"make {stage}",
            "params": {"params.yaml": params},
            "deps": [named(path) for path in (deps or {}).get(stage, [])],
            "outs": [named(path) for path in paths],
        }
        for stage, paths in stages.items()
    }
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": entries}))  # JSON is YAML


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ended_dvc(command: str = "dvc repro") -> dict:
    """Return what a journal has of a `dvc` process; this process has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "command": command}
    child.communicate(b"\n")
    return facts


def stage_statuses(run) -> dict[str, tuple[str, str]]:
    """Return the stages in the note of a pipeline's run: name -> (status, link to the run that made it)."""
    rows = [line.split(" | ") for line in run.data.tags["mlflow.note.content"].splitlines() if " | " in line]
    return {row[0].strip("| "): (row[1], row[2].strip("| ")) for row in rows[2:]}
