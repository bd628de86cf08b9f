"""What a run tells about itself, as an append-only journal on this disk.

The journal is the truth and MLflow a copy of it: `compactgpt.syncing` follows the journals in a process
of its own and writes them to MLflow. So no stage imports MLflow, a slow or dead server never slows or
kills a stage, and a run that is killed is still closed by the process that outlives it.

A run is a folder `<state>/tracking/<time>-<stage>-<random>/` with `journal.jsonl`, one JSON object a line
(`kind` is start, params, tags, metrics, artifact or end), and `artifacts/`, copies of the logged files.
"""

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Scalar = str | int | float | bool | None


class Tracker(Protocol):
    """The few verbs that a stage needs."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Log what the run can be searched by."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a small file or folder as it is now."""

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""


class NullTracker:
    """Tracks nothing: for tests, and for `--tracker none`."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Forget."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Forget."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Forget."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Forget."""

    def end(self, status: str) -> None:
        """Forget."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Turn nested mappings into dotted keys; lists become JSON text."""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers of a nested report, under dotted keys."""
    flat = flatten(report)
    return {
        key: float(v) for key, v in flat.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


class Journal:
    """A tracker that appends to a journal; each line is one write, so that a kill tears at most the last."""

    def __init__(self, state: Path, stage: str, start: Mapping[str, Any]) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.folder = state / "tracking" / f"{stamp}-{stage}-{secrets.token_hex(3)}"
        (self.folder / "artifacts").mkdir(parents=True)
        self._file = os.open(self.folder / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._append("start", {"stage": stage, **start})

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "time_ms": now_ms(), **content}, ensure_ascii=False)
        os.write(self._file, line.encode() + b"\n")

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""
        self._append("params", {"values": flatten(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""
        self._append("metrics", {"values": dict(values), "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Log what the run can be searched by."""
        self._append("tags", {"values": dict(values)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a small file or folder as it is now."""
        target = self.folder / "artifacts" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target)
        self._append("artifact", {"path": target.relative_to(self.folder).as_posix(), "folder": folder})

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self._append("end", {"status": status})
        os.fsync(self._file)
        os.close(self._file)


def git_facts(root: Path) -> dict[str, str]:
    """Commit, branch and cleanness of the repository at `root`; empty where there is none."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
