"""Commands that prepare, estimate and run the pipeline."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import PARAMS, AsJson, ExperimentName, Settings
from compactgpt.common.console import echo, echo_json, report
from compactgpt.common.errors import UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json
from compactgpt.tracking.dvc_files import LOCK

CALLED_BY_MAKE = "Called by make repro"

app = typer.Typer()
experiment = typer.Typer(no_args_is_help=True, help="List, show, apply, run and record named experiments.")
app.add_typer(experiment, name="experiment")


@app.command()
def estimate(settings: Settings = None, as_json: AsJson = False) -> None:
    """Estimate the size, time, memory and loss of a run before it starts.

    Example: compactgpt estimate -S training.max_steps=20000 -S model.n_layer=6
    """
    from compactgpt.experiments import load_changed_params
    from compactgpt.forecast.estimate import estimate as estimate_params
    from compactgpt.forecast.estimate import format_estimate
    from compactgpt.forecast.sweep import read_sweep

    sweep = read_sweep(Path("results/ladder.json"))  # None if the file is missing
    params = load_changed_params(PARAMS, settings or [])
    found = estimate_params(params, sweep)
    if as_json:
        echo_json(found)
        return
    echo(format_estimate(found, params.estimate))
    changes = [word for setting in settings or [] for word in ("-S", setting)]
    echo(f"next: {shlex.join(['dvc', 'exp', 'run', *changes]) if changes else 'make repro'}")


@app.command()
def init_corpus(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Text files or folders of text.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Write the files without asking.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Maximum training time (default: 60).")
    ] = None,
) -> None:
    """Copy your text to corpus/, and set parameters that suit the text in params.yaml.

    Prints each changed value, and asks before it writes.
    Example: compactgpt init-corpus my.txt --yes
    """
    from compactgpt.init_corpus import apply_plan, plan_corpus

    before = _current_version()
    plan = plan_corpus(paths, PARAMS, minutes)
    echo("\n".join([*plan.found, *(plan.changes or [f"{PARAMS} has these values already"])]))
    if not yes and not (sys.stdin.isatty() and typer.confirm("Apply these values?")):
        echo("nothing was changed; next: the same command with --yes")
        return
    apply_plan(plan, PARAMS)
    copies = [f"{target}.dvc" for _, _, target, *_ in plan.additions]
    added = shlex.join(copies)
    # `dvc add` stages a .dvc file in git, and `dvc remove` does not unstage it.
    remove = f"; dvc remove --outs {added}; git reset -q -- {added}" if copies else ""
    echo(f"next: make repro\n{_undo(before, remove)}")


def _current_version() -> str:
    """Return a git commit that has the tracked files as they are now, without changing branch or files."""
    try:
        # The commit is on no branch, and git deletes it some weeks later. "": nothing differs from HEAD.
        return git_text(Path(), "stash", "create")[:12] or "HEAD"
    except UserError:  # for example, there is no git repository
        return "HEAD"


def _undo(version: str, more: str = "") -> str:
    # Without the commands `git clean` and `rm`, files that only the other version has would stay: reports of
    # its baselines, Data Docs. `make repro` restores data/ and models/ from DVC's cache.
    restore = f"git checkout {version} -- {PARAMS} {LOCK} reports; git clean -fdq reports; rm -rf data models"
    return f"to undo: {restore}{more}; make repro"


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can run.

    Prints hardware, MLflow store, usable baselines, estimated times, and whether Hugging Face answers.
    Example: compactgpt doctor
    """
    from compactgpt.doctor import examine, format_report

    found = examine(PARAMS)
    if as_json:
        echo_json(found)
    else:
        echo(format_report(found))


@experiment.command("list")
def list_experiments() -> None:
    """List the experiments in conf/experiments: their purposes and what they need.

    Example: compactgpt experiment list
    """
    from compactgpt.experiments import load_experiments

    for name, found in load_experiments().items():
        echo(f"{name}\n  {found.purpose}\n  needs {found.needs}")
    echo("next: compactgpt experiment show NAME")


@experiment.command("show")
def show_experiment(name: ExperimentName, settings: Settings = None) -> None:
    """Show the purpose of an experiment, and the values of params.yaml that it changes.

    Example: compactgpt experiment show note
    """
    from compactgpt import experiments

    echo("\n".join(experiments.describe(name, PARAMS, settings or [])))
    echo(f"next: compactgpt experiment run {name}")
    echo(f"to only write these values to params.yaml: compactgpt experiment apply {name}")


@experiment.command("apply")
def apply_experiment(name: ExperimentName, settings: Settings = None) -> None:
    """Write the values of an experiment to params.yaml.

    Example: compactgpt experiment apply note -S training.max_steps=1000
    """
    from compactgpt import experiments

    before = _current_version()
    changes = experiments.apply(name, PARAMS, settings or [])
    echo("\n".join(changes) or f"{PARAMS} has these values already")
    echo(f"next: make repro\n{_undo(before)}")


@experiment.command("run")
def run_experiment(name: ExperimentName, settings: Settings = None) -> None:
    """Apply an experiment and run the pipeline with `dvc exp run`.

    Writes params.yaml, dvc.lock, data/, models/ and reports/.
    A sweep (several trainings) writes results/NAME.json instead.
    Example: compactgpt experiment run shakespeare-quick
    """
    from compactgpt import experiments
    from compactgpt.data.hub import check_sources
    from compactgpt.speed import announce_times

    runs = experiments.configurations(name, PARAMS, settings or [])
    if experiments.find_experiment(name).sweep:
        echo(announce_times(runs)[0])
        _run_sweep(name, settings or [], runs[0].runtime.num_threads)
        return
    check_sources(runs[0])
    echo("\n".join(announce_times(runs)))
    before = _current_version()
    experiments.run(name, PARAMS, settings or [])
    metrics = read_json(Path("reports/metrics.json"))
    # A diverged training has no perplexity in the file, because the value is too large for a float.
    perplexity = f"{metrics['perplexity']:.2f}" if "perplexity" in metrics else "not defined"
    echo(f"our model, measured: loss {metrics['loss']:.3f}, perplexity {perplexity}")
    echo("The page: reports/index.html")
    echo(f"to keep the values: compactgpt experiment record {name}")
    echo(_undo(before))


def _run_sweep(name: str, settings: list[str], num_threads: int) -> None:
    from compactgpt.common.device import prepare_process

    prepare_process(num_threads)  # sets environment variables: torch reads them during the imports below
    from compactgpt.evaluation.sweep_runs import run_sweep
    from compactgpt.tracking import state_folder

    path = Path("results", f"{name}.json")
    run_sweep(name, PARAMS, settings, path, state_folder() / name, echo)
    echo(f"{path}: commit the file" + ("; next: compactgpt experiment fit" if name == "ladder" else ""))


@experiment.command("record")
def record_experiment(name: ExperimentName) -> None:
    """Write the metrics of a finished experiment to results/NAME.json.

    The DVC stage `comparison` reads this file.
    Example: compactgpt experiment record note
    """
    from compactgpt.reporting.results import record_result

    path = record_result(name)
    echo(
        f"{path}: commit the file, or delete it to undo; next: `dvc repro comparison` adds its values to the "
        f"reports, and judges the claims that name {name}"
    )


@experiment.command("fit")
def fit_experiment(name: ExperimentName = "ladder") -> None:
    """Fit a scaling law to a sweep of trainings, and predict the loss of a training with params.yaml.

    Also writes the law to results/NAME.json.
    Example: compactgpt experiment fit ladder
    """
    from compactgpt.forecast.sweep import fit_sweep

    echo(fit_sweep(Path("results", f"{name}.json"), PARAMS))


@app.command(rich_help_panel=CALLED_BY_MAKE)
def check() -> None:
    """Check that params.yaml is valid, and that DVC can read every dependency.

    Before the first run, also estimates the time of the run.
    """
    from compactgpt.config import load_params
    from compactgpt.data.inputs import check_dependencies
    from compactgpt.tracking import state_folder

    params = load_params(PARAMS)
    check_dependencies(Path())
    echo("params.yaml is valid, and DVC can read every dependency")
    if not (state_folder() / "seconds").exists():  # the durations of finished stages, which later runs print
        from compactgpt.doctor import estimate_minutes, format_time

        echo(f"time: {format_time(estimate_minutes([params]))}, and a minute or two for the other stages")


@app.command(rich_help_panel=CALLED_BY_MAKE)
def sync(warn: Annotated[bool, typer.Option("--warn", help="If MLflow fails, only warn.")] = False) -> None:
    """Copy the finished pipeline runs of this folder to MLflow."""
    from compactgpt.tracking.mlflow_logger import sync as sync_runs

    try:
        address = sync_runs(Path.cwd())
    except UserError as error:
        if not warn:
            raise
        report(f"warning: {error}")
        return
    echo(f"MLflow at {address} has all finished pipeline runs of this folder")


@app.command(rich_help_panel=CALLED_BY_MAKE)
def repair() -> None:
    """Restore dvc.lock if DVC was killed while it wrote the file."""
    from compactgpt.tracking.dvc_files import restore_lock

    if restore_lock(Path()):
        echo(
            "dvc.lock was incomplete because DVC was killed. "
            "The copy from before the last stage has replaced the file"
        )
