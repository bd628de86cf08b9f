"""Code that all stage scripts share. Each script opens its stage with `open_stage`."""

import ctypes
import fcntl
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from compactgpt.common.console import Progress, ProgressBar, handle_user_errors, report, silent
from compactgpt.common.device import dist_info, under_torchrun
from compactgpt.common.errors import BadConfig, Busy, CheckFailed
from compactgpt.common.git import git_facts
from compactgpt.common.sections import NAME_PATTERN, NAME_RULE
from compactgpt.common.storage import MANIFEST, read_manifest, write_json, write_text
from compactgpt.config import Params, load_params
from compactgpt.tracking import dvc_files, journal
from compactgpt.tracking.dvc_files import PARAMS, TOKENS, Folder, params_sha256
from compactgpt.tracking.journal import Journal, NullTracker, flatten, process_facts, state_folder
from compactgpt.tracking.records import differing

TrackerName = Annotated[Literal["mlflow", "none"], typer.Option(envvar="COMPACTGPT_TRACKER")]
# For each stage: the splits that the stage reads, and the purpose that MLflow shows.
SPLIT_USES: dict[str, dict[str, str]] = {
    "training": {"train": "training", "val": "validation"},
    "evaluation": {"val": "evaluation"},
    "baseline": {"val": "evaluation"},
}
LARGE = ("corpus", "data", "models")  # folders whose files are too large to hash in each stage
_PARAMS = Path(PARAMS)


def new_app() -> typer.Typer:
    """Return the Typer app of a stage script."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Stage:
    """A running stage: its parameters, its tracker, and methods that print and log."""

    name: str  # as in dvc.lock, such as `training` or `baseline@xz`
    params: Params  # all sections of params.yaml
    tracker: Journal | NullTracker
    params_sha256: str = ""  # hash of the stage's parameters; empty if dvc.yaml does not have the stage
    is_main_process: bool = True  # only the main process writes, logs and shows progress

    def progress(self, unit: str) -> Progress:
        """Return a progress bar that counts `unit`, such as `steps`. Only the main process shows it."""
        return ProgressBar(self.name, unit) if self.is_main_process else silent

    def print_message(self, message: str) -> None:
        """Print a message to stderr, in the main process only."""
        if self.is_main_process:
            report(f"{self.name}: {message}")

    def text(self, name: str, content: str, folder: str) -> None:
        """Log `content` as the text file `name` in a folder of the MLflow run."""
        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            path = Path(scratch) / name
            path.write_text(content, encoding="utf-8")
            self.tracker.artifact(path, folder)

    def ignored_files(self) -> Callable[[str], bool]:
        """Return a function that takes a file's path, and returns whether DVC ignores the file."""
        return dvc_files.ignored_files(Path())

    def report(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write `value` and the hash of the stage's parameters as a report. Log report and metrics."""
        made_with = {"params_sha256": self.params_sha256} if self.params_sha256 else {}
        write_json(path, {**value, **made_with})
        if metrics := journal.stage_metrics(self.name, value):
            self.tracker.metrics(metrics)
        self.tracker.artifact(path, "reports")

    def data_docs(self, folder: Path) -> None:
        """Log a folder of Data Docs (HTML pages of GX) in MLflow, and print the path of index.html."""
        self.tracker.artifact(folder, "data_docs")
        self.print_message(f"Data Docs: {folder / 'index.html'}")


@contextmanager
def open_stage(name: str, tracker: str, logged: tuple[str, ...] = (), item: str = "") -> Iterator[Stage]:
    """Lock a stage and open its MLflow run, for a `with` block.

    `tracker` is `mlflow` or `none`. `logged` names the sections of params.yaml that MLflow shows. `item` is
    the part of a DVC stage's name after `@`, such as `xz` in `baseline@xz`.
    """
    full_name = f"{name}@{item}" if item else name
    with _stoppable(), handle_user_errors("stopped; `dvc repro` continues with this stage"):
        _die_with_parent()
        if item and not re.fullmatch(NAME_PATTERN, item):
            raise BadConfig(f"{name} {item!r}: {NAME_RULE}")
        if not dist_info().is_main_process:
            yield Stage(full_name, load_params(_PARAMS), NullTracker(), is_main_process=False)
            return
        with _only_one(full_name):
            stages = dvc_files.read_stages(Folder(Path()))
            definition = stages.get(full_name, {})  # empty for a stage that dvc.yaml does not have
            # Read hashes before `load_params`, so that `_require_unchanged` notices each later change.
            hashed, files = _read_params(definition), _read_files(definition)
            if is_dvc := "DVC_STAGE" in os.environ and full_name in stages:
                dvc_files.keep_lock(Path())
                report(_describe_position([*stages], full_name))
            params, begin = load_params(_PARAMS), time.time()
            run, status = _start_run(tracker, full_name, params, logged), "FAILED"
            try:
                yield Stage(full_name, params, run, params_sha256(hashed) if hashed else "")
                if is_dvc:
                    _require_unchanged(full_name, definition, hashed, files)
                    write_text(_seconds_file(full_name), f"{time.time() - begin:.0f}\n")
                status = "FINISHED"
            except (KeyboardInterrupt, SystemExit, Busy):
                status = "KILLED"
                raise
            finally:
                run.end(status)


def _read_params(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a stage's parameters by dotted key, as in dvc.lock."""
    tree = dvc_files.parse_yaml(Folder(Path()).read(PARAMS), PARAMS)
    return {key: dvc_files.value_at(tree, key) for key in definition.get("params", [])}


def _read_files(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return path -> MD5 of each file that a stage reads (in LARGE folders: path -> modification time)."""
    states: dict[str, Any] = {}
    for path in map(Path, definition.get("deps", [])):
        for file in [path, *path.rglob("*")]:
            if file.is_file() and not any(map(dvc_files.is_ignored, file.parts)):
                is_large = path.parts[0] in LARGE
                states[str(file)] = file.stat().st_mtime_ns if is_large else dvc_files.md5_file(file)
    return states


def _require_unchanged(
    stage: str, definition: Mapping[str, Any], params: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """Raise CheckFailed if a parameter or a dependency changed while the stage ran."""
    # DVC hashes the dependencies after the command. If a file changed meanwhile, dvc.lock would have the hash
    # of the new file, although the command used the old file (treeverse/dvc#11058).
    new_params, new_files = _read_params(definition), _read_files(definition)
    changed = [
        f"{key} ({old} -> {new})"
        for key, (old, new) in differing(flatten(params), flatten(new_params)).items()
    ]
    changed += differing(files, new_files)
    if changed:
        raise CheckFailed(
            f"changed while {stage} ran: {', '.join(changed[:5])}. DVC records no results: run "
            "`dvc repro` again; if you restore the files first, training resumes"
        )


def _seconds_file(stage: str) -> Path:
    return state_folder() / "seconds" / stage


def _describe_position(stages: list[str], stage: str) -> str:
    """Return a message: the stage's number, and how long this and the later stages took before."""
    position = stages.index(stage)
    files = [file for file in map(_seconds_file, stages[position:]) if file.exists()]
    minutes = sum(float(file.read_text()) for file in files) / 60
    left = f"; this and the later stages took {minutes:,.0f} min last time" if minutes >= 0.5 else ""
    return f"stage {position + 1} of {len(stages)}: {stage}{left}"


def _start_run(tracker: str, name: str, params: Params, logged: tuple[str, ...]) -> Journal | NullTracker:
    if tracker == "none":
        return NullTracker()
    from compactgpt.tracking.mlflow_logger import start_logger

    here = Path.cwd()
    tags = {**git_facts(here), **journal.machine_facts()}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
        tags["dvc.baseline"] = os.environ.get("DVC_EXP_BASELINE_REV", "")
    run = Journal(state_folder(), name, {"tags": tags, "workspace": str(here), **process_facts()})
    run.keep_before(here)
    sections = params.model_dump(mode="json")
    run.params(journal.tuned_params({key: sections[key] for key in logged}))
    contexts = SPLIT_USES.get(name.partition("@")[0], {})
    if contexts and Path(TOKENS, MANIFEST).exists():
        run.inputs(journal.token_files(read_manifest(Path(TOKENS))["files"], contexts))
    start_logger(run.run_folder)
    return run


def start_processes(module: str, tracker: str) -> None:
    """Start the script `module` in `launcher.processes` processes, and exit with the exit code of `launch`.

    Does nothing if the number of processes is 1, or if torchrun started this process.
    """
    with handle_user_errors():
        launcher = load_params(_PARAMS).training.launcher
        if launcher.processes == 1 or under_torchrun():
            return
        from compactgpt.training.distributed import launch  # imports torch: only when needed

        _die_with_parent()
        with _stoppable():
            exit_code = launch(module, [f"--tracker={tracker}"], launcher)
        raise typer.Exit(exit_code)


@contextmanager
def _stoppable() -> Iterator[None]:
    """In a `with` block, exit with code 143 on SIGTERM.

    After the block, ignore SIGTERM, so that the exit code stays the same.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _die_with_parent() -> None:
    """On Linux, end this process when its parent process (`dvc` or torchrun) ends."""
    # Otherwise, if only `dvc` was killed, the stage would still run during the next `dvc repro`.
    if ("DVC_STAGE" in os.environ or under_torchrun()) and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG: Linux sends a signal when the parent process ends
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Lock a stage for a `with` block. Raise Busy if another process has locked it."""
    path = state_folder() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise Busy(
                f"stage {name} is already running here (process {file.read().strip() or 'unknown'}): "
                "wait for it to end, then run the same command again"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
