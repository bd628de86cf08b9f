"""Write and read journals: local files with everything that a stage logs.

Each line is a JSON object with a `kind`, such as `params`.
"""

import functools
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig
from compactgpt.common.git import DIFF, git_facts, uncommitted_changes, write_private
from compactgpt.common.storage import fsync_folder, make_folder
from compactgpt.tracking.dvc_files import LOCK, PARAMS, STAGES, TOKENS

Scalar = str | int | float | bool | None
DEFAULT_URI = "sqlite:///mlflow.db"  # a relative path: each copy of the repository has its own store
EXPERIMENT = "compactgpt"
JOURNAL = "journal.jsonl"
BEFORE = "before"  # name of the folder with dvc.lock and other files as they were before the first stage
LOCKED = "requirements.lock"
MAX_DIGEST = 36  # the greatest number of characters that MLflow accepts as the hash of a data set
_TAIL = 65_536  # bytes to read from the end of a journal: more than the last line can have
_SCHEMES = {"http", "https", "sqlite", "postgresql", "mysql", "mssql"}
_PASSWORD = re.compile(r"(://)[^@\s]*@|((?:password|passwd|pwd)=)[^&\s]+")
# Processor flags and environment variables that can change the rounding of floating-point sums.
VECTORS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
# The sections of params.yaml that are logged to MLflow.
_SECTIONS = ("training", "model", "tokenization", "download", "evaluation", "baseline", "inspection",
             "validation", "runtime")  # fmt: skip
# Metrics for MLflow: (pattern for dotted keys in a report, name of the metric).
_METRICS = [
    (r"(loss|perplexity|bits_per_byte)\.value", r"\1"),
    (r"tasks\.(.+)\.accuracy\.value", r"\1_accuracy"),
    (r"views\.(.+)\.perplexity\.value", r"perplexity_\1"),
    (r"text\.statistics\.greedy\.(loop_rate|seq_rep_4)\.value", r"\1"),
]


def state_folder() -> Path:
    """Return the repository's folder `.state`, even if DVC runs an experiment in a temporary folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()) / ".state"


def tracking_folder(root: Path) -> Path:
    """Return the folder with all journals of the repository `root`."""
    return root / ".state" / "tracking"


def without_password(text: str) -> str:
    """Return the text with the user and password of every URL replaced by `***`."""
    return _PASSWORD.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)


def tracking_store() -> dict[str, str]:
    """Return `uri`, `experiment` and `experiment_id` of the MLflow store that the environment names.

    Raises BadConfig if MLFLOW_TRACKING_URI is not the address of a server or a database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in _SCHEMES:
        raise BadConfig(
            f"MLFLOW_TRACKING_URI is {without_password(uri)!r}, allowed are the address of a server "
            "(http://HOST:PORT) or a database (sqlite:///FILE, postgresql://...). Unset it to use mlflow.db"
        )
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    name = "" if experiment_id else os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return {"uri": without_password(uri), "experiment": name, "experiment_id": experiment_id}


def flatten(values: Mapping[str, Any], prefix: str = "", max_depth: int = 99) -> dict[str, Scalar]:
    """Return the values of nested mappings by dotted key, such as `model.n_layer`.

    Lists, and mappings deeper than `max_depth`, become JSON strings.
    """
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and max_depth > 1:
            flat |= flatten(value, f"{prefix}{key}.", max_depth - 1)
        elif isinstance(value, Mapping | list | tuple):
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False, sort_keys=True)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of a nested report as floats, by dotted key such as `loss.value`."""
    return {
        key: float(value)
        for key, value in flatten(report).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def tuned_params(tree: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the parameters that are logged to MLflow, by dotted key. `tree` is the content of params.yaml.

    A mapping inside a section becomes one parameter, as a JSON string.
    """
    params: dict[str, Scalar] = {}
    for section in _SECTIONS:
        if isinstance(values := tree.get(section), Mapping):
            params |= flatten(values, f"{section}.", max_depth=2)
    return params


def stage_metrics(stage: str, report: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a stage's report, by their names in MLflow.

    `stage` is a name such as `baseline@xz`.
    """
    name, _, item = stage.partition("@")
    if name == "training":
        return {"val/best_loss": report["best_val_loss"]} if "best_val_loss" in report else {}
    if name not in ("evaluation", "baseline"):
        return {}
    group, metrics = "eval" if name == "evaluation" else f"baselines/{item}", {}
    for key, value in numbers(report).items():
        for pattern, named in _METRICS:
            if match := re.fullmatch(pattern, key):
                metrics[f"{group}/{match.expand(named)}"] = value
    return metrics


def token_files(files: Mapping[str, Any], contexts: Mapping[str, str]) -> list[dict[str, str]]:
    """Return descriptions of the token files, the data sets that `Journal.inputs` logs.

    `files` is the mapping `files` of a manifest. `contexts` maps a split to its use, such as `training`.
    """
    found = []
    for split, context in contexts.items():
        if file := files.get(name := f"{split}.tokens"):
            facts = {"digest": file["sha256"], "bytes": str(file["bytes"])}
            found.append({"name": name, "source": f"{TOKENS}/{name}", "context": context, **facts})
    return found


def process_facts() -> dict[str, Any]:
    """Return the host, id and start time of this process.

    If `dvc` started this process, the key `pipeline` has id, start time and command of `dvc`.
    """
    import psutil

    own = psutil.Process()
    facts = {"host": platform.node(), "pid": own.pid, "created": own.create_time()}
    for parent in own.parents():
        with suppress(psutil.Error, ValueError):
            words = parent.cmdline()
            # `dvc` is word 0 of `dvc repro`, and word 1 of `python dvc repro`.
            position = [Path(word).name for word in words[:3]].index("dvc")
            command = " ".join(["dvc", *words[position + 1 :]])
            pipeline = {"pid": parent.pid, "created": parent.create_time(), "command": command}
            return {**facts, "pipeline": pipeline}
    return facts


class Journal:
    """A journal to which a stage appends everything that it logs.

    If the stage's process is killed, only the last line can be incomplete.
    """

    def __init__(self, state: Path, stage: str, start: Mapping[str, Any]) -> None:
        first = {"stage": stage, "store": tracking_store(), **start}
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{stage}-{secrets.token_hex(3)}"
        group = name
        if pipeline := start.get("pipeline"):  # all stages of one `dvc` process share a run folder
            seconds = time.strftime("%Y%m%dT%H%M%S", time.gmtime(pipeline["created"]))
            group = f"{seconds}.{int(pipeline['created'] * 1000) % 1000:03}-dvc-{pipeline['pid']}"
        self.run_folder = state / "tracking" / group
        self.folder = self.run_folder / name
        make_folder(self.folder / "artifacts")
        self._file = open(self.folder / JOURNAL, "ab")  # noqa: SIM115  `end` closes the file
        fsync_folder(self.folder)
        self._append("start", first)

    def keep_before(self, workspace: Path) -> None:
        """Copy dvc.yaml, dvc.lock, params.yaml, requirements.lock and the uncommitted changes to `before/`.

        If `before/` exists, an earlier stage of this `dvc` process made these copies, and nothing is copied.
        """
        before = self.run_folder / BEFORE
        if before.exists():
            return
        making = before.with_suffix(f".{os.getpid()}")
        making.mkdir()
        for name in (LOCK, PARAMS, STAGES, LOCKED):
            if (workspace / name).is_file():
                shutil.copyfile(workspace / name, making / name)
        if git_facts(workspace).get("git.dirty") == "true":
            write_private(making / DIFF, uncommitted_changes(workspace)[0])
        making.rename(before)

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        line = {"kind": kind, "time_ms": time.time_ns() // 1_000_000, **content}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, with a dotted key for each value of a nested mapping."""
        self._append("params", {"values": flatten(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a training step."""
        self._append("metrics", {"values": dict(values), "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Log tags: texts by which MLflow can search runs."""
        self._append("tags", {"values": dict(values)})

    def inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the data sets that the stage reads, in the form that `token_files` returns."""
        if datasets:
            self._append("inputs", {"datasets": [dict(dataset) for dataset in datasets]})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a copy of a small file or folder. MLflow shows the copy in the artifact folder `folder`."""
        target = self.folder / "artifacts" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            shutil.copy(path, target)  # with permissions, so a private file stays private
        self._append("artifact", {"path": target.relative_to(self.folder).as_posix(), "folder": folder})

    def end(self, status: str) -> None:
        """Write the last line with the status FINISHED, FAILED or KILLED, and close the journal."""
        self._append("end", {"status": status})
        os.fsync(self._file.fileno())
        self._file.close()


class NullTracker:
    """A tracker that logs nothing.

    The option `--tracker none` uses it. In distributed training, all processes but the main process use it.
    """

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a function that does nothing, instead of a method of `Journal`."""
        return lambda *_arguments, **_options: None


def journal_lines(raw: bytes) -> list[dict[str, Any]]:
    """Return the parsed lines of a journal with the content `raw`, except incomplete and damaged lines."""
    lines = []
    for line in raw[: raw.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "kind" in line]


class JournalFile:
    """A journal on disk, opened for reading. The stage's process may still append to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL

    @functools.cached_property
    def start(self) -> dict[str, Any]:
        """The first line of the journal, which has the kind `start`. Empty if this line is incomplete."""
        with open(self.path, "rb") as file:
            lines = journal_lines(file.readline())
        return lines[0] if lines else {}

    @property
    def last(self) -> dict[str, Any]:
        """The last complete line of the journal."""
        lines, _ = self.read(max(0, self.path.stat().st_size - _TAIL))
        return lines[-1] if lines else self.start

    @property
    def status(self) -> str:
        """FINISHED, FAILED or KILLED, as in MLflow; empty while the stage runs."""
        # Call `is_alive` before `last`: else a stage that ends between the two calls would look killed.
        alive = is_alive(self.start)
        last = self.last
        return str(last["status"]) if last["kind"] == "end" else "" if alive else "KILLED"

    def read(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Return the complete lines after the first `offset` bytes, and the offset after these lines."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            raw = file.read()
        return journal_lines(raw), offset + raw.rfind(b"\n") + 1


def is_alive(process: Mapping[str, Any]) -> bool:
    """Return whether the process that `process` describes still runs.

    `process` has the keys `pid` and `created`, the start time of the process in seconds since 1970.
    """
    import psutil

    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process["pid"])
        is_same = abs(found.create_time() - process["created"]) < 1
        return bool(is_same and found.status() != psutil.STATUS_ZOMBIE)
    return False


def machine_facts() -> dict[str, str]:
    """Return facts about this machine that can change the rounding of results."""
    facts = {"python": platform.python_version(), "machine": platform.machine(), "torch": ""}
    with suppress(metadata.PackageNotFoundError):
        facts["torch"] = metadata.version("torch")
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in islice(file, 40) if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in lines.items()}
        facts["cpu"] = cpu.get("model name", "")
        facts["cpu.vectors"] = " ".join(flag for flag in VECTORS if flag in cpu.get("flags", "").split())
    chosen = {name: os.environ[name] for name in ARITHMETIC if name in os.environ}
    return facts | ({"arithmetic": json.dumps(chosen, sort_keys=True)} if chosen else {})


@functools.cache
def packages() -> str:
    """Return the installed packages as text with one line `name==version` for each package."""
    named = [one for one in metadata.distributions() if one.name]
    found = {(one.name.lower().replace("_", "-"), one.version) for one in named}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found))
