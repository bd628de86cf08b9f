"""What a run tells about itself, as an append-only journal on this disk.

The journal is the truth and MLflow a copy of it: `compactgpt.syncing` follows the journals in a process
of its own and writes them to MLflow. So no stage imports MLflow, a slow or dead server never slows or
kills a stage, and a run that is killed is still closed by the process that outlives it.

A run is a folder `<state>/tracking/<time>-<stage>-<random>/` with `journal.jsonl`, one JSON object a line
(`kind` is start, params, tags, metrics, inputs, artifact or end), and `artifacts/`, copies of logged files.
"""

import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from compactgpt.storage import fsync_folder, make_folder, write_text

Scalar = str | int | float | bool | None
_OF_SPLIT = ("own_tokens", "window")  # of a report of figures: they say what was read, not how well
_FOLDERS = {name: f"eval/{name}" for name in ("model", "tasks", "text", "views")} | {
    "validation": "eval/split"
}
# Of a processor, and of the environment: what changes the order or the width of sums.
VECTORS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def root() -> Path:
    """The repository: under DVC the original one, even for experiments that run in a scratch folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def state_folder() -> Path:
    """Where resumable state and journals live: ignored by git, unknown to DVC."""
    return root() / ".state"


class Tracker(Protocol):
    """The few verbs that a stage needs."""

    def begin(self, note: Path) -> None:
        """Go on with the run that an interrupted process noted in the file `note`; note this one if none."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Log what the run can be searched by."""

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the data that the run reads: `name`, `digest`, `source`, `context`, and what else is known."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a small file or folder as it is now."""

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED."""


class NullTracker:
    """Tracks nothing: for tests, and for `--tracker none`."""

    def begin(self, note: Path) -> None:
        """Forget."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Forget."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Forget."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Forget."""

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
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


def grouped(stage: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a stage's report under the names that every model and run shares.

    MLflow groups its charts by what stands before the last slash: `eval/` has the figures of a model on the
    val split, whatever the model; `eval/tasks/`, `eval/text/`, `eval/views/` what else was asked of it;
    `eval/bounds/` the ends of intervals. `train/` and `val/` are told step by step; what training reports at
    its end is `train/final/`. Other stages' numbers go by the stage's name.
    """
    if stage not in ("evaluation", "baseline"):
        folder = "train/final" if stage == "training" else stage
        return {f"{folder}/{key}": value for key, value in numbers(report).items()}
    named = {}
    for key, value in numbers(report).items():
        if key.startswith(("settings.", "text.settings.")):
            continue  # params say so
        group, _, rest = key.partition(".")
        folder, name = (_FOLDERS[group], rest) if group in _FOLDERS else ("eval", key)
        if key in _OF_SPLIT:
            folder = _FOLDERS["validation"]
        if key.endswith((".low", ".high")):
            folder = folder.replace("eval", "eval/bounds", 1)
        named[f"{folder}/{name.removeprefix('statistics.').removesuffix('.value')}"] = value
    return named


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


class Journal:
    """A tracker that appends to a journal; each line is one write, so that a kill tears at most the last.

    A stage that can go on where an interrupted one was opens it `held`: nothing is written before `begin`
    (or `end`) tells whether this is a run of its own or the rest of an earlier one. The rest has a journal
    of its own, whose first line names the first journal of the run (`continues`); what that run has
    already told of a step is not told again.
    """

    def __init__(self, state: Path, stage: str, start: Mapping[str, Any], *, held: bool = False) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.folder = state / "tracking" / f"{stamp}-{stage}-{secrets.token_hex(3)}"
        make_folder(self.folder / "artifacts")
        self._file = os.open(self.folder / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fsync_folder(self.folder)
        self._torn = False
        self._held: list[dict[str, Any]] | None = [] if held else None
        self._told: dict[str, int] = {}  # last step of each metric that the run has had before
        self._append("start", {"stage": stage, **start})

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        line = {"kind": kind, "time_ms": now_ms(), **content}
        if self._held is None:
            self._write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        else:
            self._held.append(line)

    def _write(self, line: bytes) -> None:
        """Append a line, behind the end of one that a full or failing disk took in part."""
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
        """Go on with the run that an interrupted process noted in the file `note`; note this one if none."""
        first = note.read_text().strip() if note.exists() else ""
        if first:
            self._told = _last_steps(self.folder.parent, first)
        else:
            write_text(note, self.folder.name + "\n")
        self._release(first)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings are flattened with dots."""
        self._append("params", {"values": flatten(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at a step."""
        news = {key: value for key, value in values.items() if not step or step > self._told.get(key, 0)}
        if news:
            self._append("metrics", {"values": news, "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Log what the run can be searched by."""
        self._append("tags", {"values": dict(values)})

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the data that the run reads: `name`, `digest`, `source`, `context`, and what else is known."""
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
    """The whole lines of a journal; what a failing disk or a power loss tore or damaged is left out."""
    lines = []
    for line in raw[: raw.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "kind" in line]


def _last_steps(folder: Path, first: str) -> dict[str, int]:
    """Last step of each metric in the journals of one run, whether MLflow has them already or not."""
    last: dict[str, int] = {}
    for path in [*folder.glob("*/journal.jsonl"), *folder.glob("done/*/journal.jsonl")]:
        lines = journal_lines(path.read_bytes())
        if not lines or first not in (path.parent.name, lines[0].get("continues")):
            continue
        for line in lines:
            if line["kind"] == "metrics":
                last.update({key: max(line["step"], last.get(key, 0)) for key in line["values"]})
    return last


def machine_facts() -> dict[str, str]:
    """What decides how sums are rounded, beside params.yaml: the processor and the libraries."""
    facts = {"python": platform.python_version(), "machine": platform.machine(), "torch": _version("torch")}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        about = dict(line.split(":", 1) for line in islice(file, 40) if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in about.items()}
        facts["cpu"] = cpu.get("model name", "")
        facts["cpu.vectors"] = " ".join(flag for flag in VECTORS if flag in cpu.get("flags", "").split())
    chosen = {name: os.environ[name] for name in ARITHMETIC if name in os.environ}
    return facts | ({"arithmetic": json.dumps(chosen, sort_keys=True)} if chosen else {})


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
