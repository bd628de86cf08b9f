"""What a stage logs, as an append-only journal on this disk.

The journal is complete, and MLflow holds a copy of it: `mlflow_logger` follows the journals in a child
process. So no stage imports MLflow or waits for a server, and a run that is killed is still closed.

A run folder `.state/tracking/<time>-<name>/` belongs to one `dvc` process, or to one stage that was run by
hand. It holds `before/` (params.yaml, dvc.lock, uncommitted changes as the first stage found them), and for
each stage a folder `<time>-<stage>-<random>/` with `journal.jsonl` and `artifacts/`, copies of logged files.
A journal has one JSON object a line; `kind` is start, params, tags, metrics, inputs, artifact or end. Its
first line names the tracking store that the run is meant for.
"""

import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from compactgpt.common.errors import BadConfig
from compactgpt.common.git import DIFF, git_facts, uncommitted_changes, write_private
from compactgpt.common.storage import fsync_folder, make_folder, write_text
from compactgpt.tracking.dvc_files import CHAIN, LOCK, PARAMS

Scalar = str | int | float | bool | None
DEFAULT_URI = "sqlite:///mlflow.db"  # relative to the repository, so that a copy of it has its own
EXPERIMENT = "compactgpt"
BEFORE = "before"
LOCKED = "requirements.lock"
_SCHEMES = {"http", "https", "sqlite", "postgresql", "mysql", "mssql"}
_PASSWORD = re.compile(r"(://)[^/\s]+@")
# Of a processor, and of the environment: what changes the order or the width of sums.
VECTORS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def root() -> Path:
    """Return the repository: under DVC the original one, even if the experiment runs in a scratch folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def state_folder() -> Path:
    """Return the folder of resumable state and journals: ignored by git, unknown to DVC."""
    return root() / ".state"


def tracking_folder(root: Path) -> Path:
    """Return the folder of a repository's run folders."""
    return root / ".state" / "tracking"


def without_password(text: str) -> str:
    """Hide user and password of every address in a text."""
    return _PASSWORD.sub(r"\1***@", text)


def tracking_store() -> dict[str, str]:
    """Return the tracking store that MLflow's environment variables name, as a journal keeps it.

    Raises:
        BadConfig: MLFLOW_TRACKING_URI is not an address that a run can be logged to.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in _SCHEMES:
        raise BadConfig(
            f"MLFLOW_TRACKING_URI is {without_password(uri)!r}, allowed are the address of a server "
            "(http://HOST:PORT) or a database (sqlite:///FILE, postgresql://...). Unset it for mlflow.db here"
        )
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    name = "" if experiment_id else os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return {"uri": without_password(uri), "experiment": name, "experiment_id": experiment_id}


class Tracker(Protocol):
    """The few methods that a stage needs."""

    def begin(self, note: Path) -> None:
        """Resume the run that an interrupted process noted in the file `note`; note this run if none did."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Log tags, by which the run can be searched."""

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the data that the run reads: `name`, `digest`, `source`, `context`, `bytes`."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a small file or folder as it is now."""

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""


class NullTracker:
    """Tracks nothing: for tests, and for `--tracker none`."""

    def begin(self, note: Path) -> None:
        """Do nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def end(self, status: str) -> None:
        """Do nothing."""


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
    """Return milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


def process_facts() -> dict[str, Any]:
    """Return what identifies this process later, and the `dvc` process that runs it.

    The stages of one `dvc` process share a run folder, and a parent run in MLflow.
    """
    import psutil

    own = psutil.Process()
    facts = {"host": platform.node(), "pid": own.pid, "created": own.create_time()}
    for parent in own.parents():
        with suppress(psutil.Error):
            words = parent.cmdline()
            position = next((i for i, word in enumerate(words[:3]) if Path(word).name == "dvc"), None)
            if position is not None:
                command = " ".join(["dvc", *words[position + 1 :]])
                pipeline = {"pid": parent.pid, "created": parent.create_time(), "command": command}
                return {**facts, "pipeline": pipeline}
    return facts


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))


class Journal:
    """A tracker that appends to a journal; each line is one write, so that a kill tears at most the last.

    A stage that may resume an interrupted run opens it `held`: nothing is written before `begin` or `end`.
    A resumed run has a journal of its own, whose first line names the first journal of the run
    (`continues`); metrics of steps that the run has logged before are left out.
    """

    def __init__(self, state: Path, stage: str, start: Mapping[str, Any], *, held: bool = False) -> None:
        name = f"{_stamp(time.time())}-{stage}-{secrets.token_hex(3)}"
        pipeline = start.get("pipeline")
        if pipeline:
            milliseconds = int(pipeline["created"] * 1000) % 1000
            group = f"{_stamp(pipeline['created'])}.{milliseconds:03}-dvc-{pipeline['pid']}"
        else:
            group = name
        self.run_folder = state / "tracking" / group
        self.folder = self.run_folder / name
        make_folder(self.folder / "artifacts")
        self._file = os.open(self.folder / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fsync_folder(self.folder)
        self._torn = False
        self._held: list[dict[str, Any]] | None = [] if held else None
        self._logged: dict[str, int] = {}  # last step of each metric that earlier processes have logged
        self._append("start", {"stage": stage, "store": tracking_store(), **start})

    def keep_before(self, workspace: Path) -> None:
        """Keep the files that the pipeline starts from, unless an earlier stage of it has."""
        before = self.run_folder / BEFORE
        if before.exists():
            return
        making = before.with_suffix(f".{os.getpid()}")
        making.mkdir()
        for name in (LOCK, PARAMS, CHAIN, LOCKED):
            if (workspace / name).is_file():
                shutil.copyfile(workspace / name, making / name)
        if git_facts(workspace).get("git.dirty") == "true":
            write_private(making / DIFF, uncommitted_changes(workspace).diff)
        making.rename(before)

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        line = {"kind": kind, "time_ms": now_ms(), **content}
        if self._held is None:
            self._write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        else:
            self._held.append(line)

    def _write(self, line: bytes) -> None:
        """Append a line, on a line of its own if a full or failing disk took a part of the last one."""
        line = b"\n" + line if self._torn else line
        self._torn = True
        while line:
            line = line[os.write(self._file, line) :]
        self._torn = False

    def _release(self, continues: str = "") -> None:
        lines, self._held = self._held or [], None
        if continues:
            lines[0]["continues"] = continues
        for line in lines:
            self._append(line["kind"], line)

    def begin(self, note: Path) -> None:
        """Resume the run that an interrupted process noted in the file `note`; note this run if none did."""
        first = note.read_text().strip() if note.exists() else ""
        if first:
            self._logged = _last_steps(self.run_folder.parent, first)
        else:
            write_text(note, self.folder.name + "\n")
        self._release(first)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""
        self._append("params", {"values": flatten(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""
        new = {key: value for key, value in values.items() if not step or step > self._logged.get(key, 0)}
        if new:
            self._append("metrics", {"values": new, "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Log tags, by which the run can be searched."""
        self._append("tags", {"values": dict(values)})

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the data that the run reads: `name`, `digest`, `source`, `context`, `bytes`."""
        if datasets:
            self._append("inputs", {"datasets": [dict(dataset) for dataset in datasets]})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a small file or folder as it is now."""
        target = self.folder / "artifacts" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)  # with its mode: what is private stays so
        self._append("artifact", {"path": target.relative_to(self.folder).as_posix(), "folder": folder})

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self._append("end", {"status": status})
        self._release()
        os.fsync(self._file)
        os.close(self._file)


def journal_lines(raw: bytes) -> list[dict[str, Any]]:
    """Return the whole lines of a journal; torn and damaged ones are left out."""
    lines = []
    for line in raw[: raw.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "kind" in line]


def run_journals(tracking: Path, first: str) -> list[Path]:
    """Return the folders of one run's journals, of which the first has this name, oldest first."""
    found = []
    for path in tracking.glob("*/*/journal.jsonl"):
        with open(path, "rb") as file:
            start = journal_lines(file.readline())
        if start and first in (path.parent.name, start[0].get("continues")):
            found.append(path.parent)
    return sorted(found, key=lambda folder: folder.name)


def _last_steps(tracking: Path, first: str) -> dict[str, int]:
    """Return the last step of each metric in the journals of one run, copied to MLflow or not."""
    last: dict[str, int] = {}
    for folder in run_journals(tracking, first):
        for line in journal_lines((folder / "journal.jsonl").read_bytes()):
            if line["kind"] == "metrics":
                last.update({key: max(line["step"], last.get(key, 0)) for key in line["values"]})
    return last


def machine_facts() -> dict[str, str]:
    """Return what decides how sums are rounded, next to params.yaml: the processor and the libraries."""
    facts = {"python": platform.python_version(), "machine": platform.machine(), "torch": _version("torch")}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in islice(file, 40) if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in lines.items()}
        facts["cpu"] = cpu.get("model name", "")
        facts["cpu.vectors"] = " ".join(flag for flag in VECTORS if flag in cpu.get("flags", "").split())
    chosen = {name: os.environ[name] for name in ARITHMETIC if name in os.environ}
    return facts | ({"arithmetic": json.dumps(chosen, sort_keys=True)} if chosen else {})


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
