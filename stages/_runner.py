"""Code that all stage scripts share.

It reads params.yaml, locks the stage, opens a run, shows progress and writes the report. It turns a user's
mistake into a one-sentence message and an exit code.
"""

import ctypes
import fcntl
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compactgpt.common.console import Progress, ProgressBar, handle_user_errors, report, silent
from compactgpt.common.errors import BadConfig, Busy, CheckFailed, UserError
from compactgpt.common.git import git_facts
from compactgpt.common.sections import NAME_PATTERN, NAME_RULE
from compactgpt.common.storage import MANIFEST, read_json, read_manifest, write_json, write_text
from compactgpt.common.torchrun import check_environment, dist_info, under_torchrun
from compactgpt.config import Params, load_params
from compactgpt.tracking import dvc_files, journal
from compactgpt.tracking.dvc_files import PARAMS, TOKENS, Folder, StageDefinition, params_sha256
from compactgpt.tracking.journal import Journal, NullTracker, flatten, process_facts, state_folder

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameters of the run.")]
TrackerName = Annotated[str, typer.Option("--tracker", envvar="COMPACTGPT_TRACKER", help="mlflow or none.")]
# The splits that each stage reads, and MLflow's context of each split.
ON_TOKENS: dict[str, dict[str, str]] = {
    "training": {"train": "training", "val": "validation"},
    "evaluation": {"val": "evaluation"},
    "baseline": {"val": "evaluation"},
}
LARGE = ("corpus", "data", "models")  # folders that can have gigabytes
ESTIMATED_ON = "two-cpu-cores"  # the machine of reports/estimate.json whose time stands for this machine


def new_app() -> typer.Typer:
    """Return a Typer app with the project's settings."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def matrix_item() -> str:
    """Return the item of the matrix stage that DVC runs: the part of the stage's name after `@`.

    DVC sets the name in the environment. So no value of params.yaml becomes part of a shell command.
    """
    return os.environ.get("DVC_STAGE", "").partition("@")[2]


@dataclass(frozen=True)
class Stage:
    """An open stage: its parameters, its tracker, and methods that report to the user."""

    name: str  # of a matrix stage with the item: `baseline@xz`
    params: Params
    tracker: Journal | NullTracker
    params_sha256: str = ""  # of the stage's parameters, as dvc.lock has them
    is_main_process: bool = True  # only the main process writes, logs and shows progress

    def progress(self, unit: str, what: str = "") -> Progress:
        """Return a progress bar with this unit, such as `steps`. Only the main process draws it."""
        return ProgressBar(what or self.name.partition("@")[0], unit) if self.is_main_process else silent

    def print_message(self, message: str) -> None:
        """Print a message to stderr, in the main process only."""
        if self.is_main_process:
            report(f"{self.name.partition('@')[0]}: {message}")

    def text(self, name: str, content: str, folder: str) -> None:
        """Log a short string as a text file."""
        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            path = Path(scratch) / name
            path.write_text(content, encoding="utf-8")
            self.tracker.artifact(path, folder)

    def report(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write the stage's report with the hash of its parameters, and log the file and its metrics."""
        made_with = {"params_sha256": self.params_sha256} if self.params_sha256 else {}
        write_json(path, {**value, **made_with})
        if metrics := journal.stage_metrics(self.name, value):
            self.tracker.metrics(metrics)
        self.tracker.artifact(path, "reports")

    def data_docs(self, folder: Path) -> None:
        """Log the Data Docs of Great Expectations, and print the path of their index page."""
        self.tracker.artifact(folder, "data_docs")
        self.print_message(f"Data Docs: {folder / 'index.html'}")


@contextmanager
def open_stage(
    name: str,
    params_file: Path,
    tracker: str,
    logged: tuple[str, ...] = (),
    item: str = "",
    *,
    held: bool = False,
) -> Iterator[Stage]:
    """Open a stage for a `with` block: lock it, open its run, and close the run at the end.

    `logged` has the sections of params.yaml to log, `item` the item of a matrix stage. With `held`, the
    tracker writes nothing before `begin`, because the stage may resume an interrupted run.
    """
    full_name = f"{name}@{item}" if item else name
    with _stoppable(), handle_user_errors("stopped; `dvc repro` resumes from here"):
        check_environment()
        _die_with_parent()
        if item and not re.fullmatch(NAME_PATTERN, item):
            raise BadConfig(f"{name} {item!r}: {NAME_RULE}")
        if not dist_info().is_main_process:
            yield Stage(full_name, load_params(params_file), NullTracker(), is_main_process=False)
            return
        with _only_one(full_name):
            stages = dvc_files.read_stages(Folder(Path()))
            definition = stages.get(full_name, StageDefinition([], [], []))
            hashed, inputs = (
                _read_params(definition),
                _read_inputs(definition),
            )  # before params.yaml is checked
            if is_dvc := "DVC_STAGE" in os.environ and full_name in stages:
                dvc_files.keep_lock(Path())
                report(_describe_position([*stages], full_name))
            params, begin = load_params(params_file), time.time()
            run, status = _start_run(tracker, full_name, params, logged, held=held), "FAILED"
            try:
                yield Stage(full_name, params, run, params_sha256(hashed) if hashed else "")
                if is_dvc:
                    _require_unchanged(full_name, definition, inputs)
                    write_text(_seconds_file(full_name), f"{time.time() - begin:.0f}\n")
                status = "FINISHED"
            except (KeyboardInterrupt, SystemExit, Busy):
                status = "KILLED"
                raise
            finally:
                run.end(status)


def _read_params(definition: StageDefinition) -> dict[str, Any]:
    """Return a stage's parameters by the keys that dvc.yaml names, as DVC writes them to dvc.lock."""
    return dvc_files.values_at(dvc_files.parse_yaml(Folder(Path()).read(PARAMS), PARAMS), definition.params)


def _read_inputs(definition: StageDefinition) -> dict[str, Any]:
    """Return a stage's parameters by dotted key, and the state of its dependencies by path.

    The state is the MD5 of code or a report, and the size and time of each file of data.
    """
    states: dict[str, Any] = {}
    for name in definition.deps if "DVC_STAGE" in os.environ else []:
        path = Path(name)
        if path.parts[0] not in LARGE:
            states[name] = dvc_files.md5_path(path)
            continue
        states[name] = set()
        for file in [path, *path.rglob("*")]:
            with suppress(OSError):  # a link to no file or to itself, or a file that was just deleted
                if file.is_file() and not any(map(dvc_files.is_ignored, file.parts)):
                    states[name].add((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return flatten(_read_params(definition)) | states


def _require_unchanged(stage: str, definition: StageDefinition, inputs: Mapping[str, Any]) -> None:
    """Raise CheckFailed if a parameter or a dependency changed while the stage ran.

    DVC hashes both after a stage's command, and would record values that the stage did not use
    (treeverse/dvc#11058).
    """
    changed, now = [], _read_inputs(definition)
    for key in {**inputs, **now}:
        old, new = inputs.get(key), now.get(key)
        if old != new:
            changed.append(key if key in definition.deps else f"{key} ({old} -> {new})")
    if changed:
        raise CheckFailed(
            f"changed while {stage} ran: {', '.join(changed[:5])}. The results are of the earlier version, "
            "so DVC does not record them. To get results of the new version, run `dvc repro` again. To keep "
            "the earlier version, restore it, then run `dvc repro`: training resumes from its last state"
        )


def _seconds_file(stage: str) -> Path:
    return state_folder() / "seconds" / stage


def _describe_position(stages: list[str], stage: str) -> str:
    """Return the number of a stage, and how long it and all later stages took in their last runs here."""
    position, seconds = stages.index(stage), 0.0
    for one in stages[position:]:
        with suppress(OSError, UserError, LookupError, TypeError, ValueError):  # unknown, or a damaged file
            if _seconds_file(one).exists():
                seconds += float(_seconds_file(one).read_text())
            elif one == "training":
                minutes = read_json(Path("reports/estimate.json"))["compact"]["minutes"]
                seconds += float(minutes[ESTIMATED_ON]) * 60
    left = f", about {seconds / 60:,.0f} min left if every later stage runs" if seconds >= 30 else ""
    return f"stage {position + 1} of {len(stages)}: {stage}{left}"


def _start_run(
    tracker: str, name: str, params: Params, logged: tuple[str, ...], *, held: bool
) -> Journal | NullTracker:
    if tracker == "none":
        return NullTracker()
    if tracker != "mlflow":
        raise typer.BadParameter(f"{tracker!r} is not a tracker: use mlflow or none", param_hint="--tracker")
    from compactgpt.tracking.mlflow_logger import start_logger

    here = Path.cwd()
    tags = {**git_facts(here), **journal.machine_facts()}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
        tags["dvc.baseline"] = os.environ.get("DVC_EXP_BASELINE_REV", "")
    run = Journal(state_folder(), name, {"tags": tags, "workspace": str(here), **process_facts()}, held=held)
    run.keep_before(here)
    sections = params.model_dump(mode="json")
    run.params(journal.tuned_params({key: sections[key] for key in logged}))
    contexts = ON_TOKENS.get(name.partition("@")[0], {})
    if contexts and Path(TOKENS, MANIFEST).exists():
        run.inputs(journal.token_files(read_manifest(Path(TOKENS))["files"], contexts))
    start_logger(run.run_folder)
    return run


def start_processes(module: str, params_file: Path, options: Mapping[str, Any]) -> None:
    """Start a stage script's module in the processes of training.launcher, and exit with their exit code.

    `options` are the stage script's. Return at once for one process, or if torchrun started this process.
    """
    with handle_user_errors():
        check_environment()
        launcher = load_params(params_file).training.launcher
        if launcher.processes == 1 or under_torchrun():
            return
        from compactgpt.training.distributed import launch  # imports torch

        _die_with_parent()
        words = [f"--{name}={value}" for name, value in options.items()]
        with _stoppable():
            exit_code = launch(module, [f"--params={params_file}", *words], launcher)
        raise typer.Exit(exit_code)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Exit cleanly on SIGTERM. Ignore SIGTERM after the stage, when Python would print a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _die_with_parent() -> None:
    """On Linux, exit if the parent (`dvc` or torchrun) is killed, so that no two processes train at once."""
    if ("DVC_STAGE" in os.environ or under_torchrun()) and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Hold the stage's lock, so that two processes never write to one folder. Raise Busy if it is held."""
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
