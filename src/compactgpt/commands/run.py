"""Commands that prepare, estimate and run the pipeline."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import PARAMS, AsJson, ExperimentName, ParamsFile, Settings
from compactgpt.common.console import echo
from compactgpt.common.storage import read_json
from compactgpt.config import Download, load_params

METRICS = Path("reports/metrics.json")  # of our model
DOWNLOADED = Path("reports/download.json")  # DVC deletes it before the stage `download` starts

app = typer.Typer()
experiment = typer.Typer(no_args_is_help=True, help="List, show, apply, run and record named experiments.")
app.add_typer(experiment, name="experiment")


@app.command()
def estimate(
    settings: Settings = None,
    measure: Annotated[bool, typer.Option(help="Also measure the speed of this machine.")] = False,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
    ladder: Annotated[Path, typer.Option(help="The results of a sweep.")] = Path("results/ladder.json"),
) -> None:
    """Estimate a run before it starts: size, time, memory and loss.

    Prints a table. Writes no file.

    Example: compactgpt estimate -S training.max_steps=20000 -S model.n_layer=6
    """
    from compactgpt.experiments import load_changed_params
    from compactgpt.forecast.estimate import estimate_configuration, format_estimate

    params = load_changed_params(params_file, settings or [])
    found = estimate_configuration(params, ladder, measure=measure)
    if as_json:
        echo(json.dumps(found, indent=2))
        return
    changes = [word for setting in settings or [] for word in ("-S", setting)]
    echo(format_estimate(found))
    if params_file == PARAMS:
        echo(f"next: {shlex.join(['dvc', 'exp', 'run', *changes]) if changes else 'make repro'}")


@app.command("init-corpus")
def init_corpus(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Text files, or folders of them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Apply the values without asking.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Training time; by default an hour, or less for a small corpus."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of a time.")] = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Use your own text: propose values of params.yaml that fit the text, and apply the values.

    Prints the documents that it found and each value that changes, and asks for confirmation. Writes
    params.yaml and keeps its comments. Copies text from other folders to corpus/ by `dvc add`, because DVC
    detects changes only in that folder.

    Example: compactgpt init-corpus my.txt --yes
    """
    _use_corpus(paths, params_file, minutes, steps, yes=yes)
    echo(f"next: make repro; git checkout HEAD -- {params_file} undoes the change of parameters")


def _use_corpus(
    paths: list[Path],
    params_file: Path,
    minutes: float | None = None,
    steps: int | None = None,
    *,
    yes: bool = True,
) -> None:
    from compactgpt.init_corpus import apply_plan, plan_corpus

    plan = plan_corpus(paths, params_file, minutes=minutes, steps=steps)
    echo("\n".join([*plan.found, *(plan.changes or [f"{params_file} has these values already"])]))
    if not yes and not (sys.stdin.isatty() and typer.confirm("Apply these values?")):
        echo("nothing was changed; next: the same command with --yes")
        raise typer.Exit
    apply_plan(plan, params_file)


@app.command()
def doctor(as_json: AsJson = False, params_file: ParamsFile = PARAMS) -> None:
    """Show what this machine can do: hardware, hub, baselines, stores, and how long runs take.

    Prints one screen. The times are estimates. Writes no file. Takes a few seconds, also without a network.

    Example: compactgpt doctor
    """
    from compactgpt.doctor import examine, format_report

    found = examine(params_file)
    echo(json.dumps(found, indent=2) if as_json else format_report(found))


@experiment.command("list")
def list_experiments() -> None:
    """List the named experiments, with the purpose and the needs of each.

    Prints the experiments in conf/experiments. Writes no file.

    Example: compactgpt experiment list
    """
    from compactgpt.experiments import load_experiments

    for name, found in load_experiments().items():
        echo(f"{name}\n  {found.purpose}\n  needs {found.needs}")
    echo("next: compactgpt experiment show NAME")


@experiment.command("show")
def show_experiment(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = PARAMS
) -> None:
    """Show the values of params.yaml that an experiment changes.

    Prints a line per parameter. Writes no file.

    Example: compactgpt experiment show note
    """
    from compactgpt import experiments

    echo("\n".join(experiments.describe(name, params_file, settings or [])))
    echo(f"next: compactgpt experiment run {name} (or first: compactgpt experiment apply {name})")


@experiment.command("apply")
def apply_experiment(
    name: ExperimentName,
    settings: Settings = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Your own text: see `compactgpt init-corpus`.")
    ] = None,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Set the values of an experiment in params.yaml.

    Prints a line per parameter. Writes params.yaml and keeps its comments. --corpus PATH then has the effect
    of `compactgpt init-corpus PATH --yes`.

    Example: compactgpt experiment apply note -S training.max_steps=1000
    """
    from compactgpt import experiments

    changes = experiments.apply(name, params_file, settings or [])
    echo("\n".join(changes) or f"{params_file} has these values already")
    if corpus:
        _use_corpus(corpus, params_file)
    echo(f"next: make repro; git checkout HEAD -- {params_file} undoes the change")


@experiment.command("run")
def run_experiment(name: ExperimentName, settings: Settings = None, params_file: ParamsFile = PARAMS) -> None:
    """Run an experiment: with `dvc exp run`, or all runs of a sweep.

    Prints the estimated time, the output of DVC and the measured loss, or a line per run of a sweep. Writes
    params.yaml and the outputs of the pipeline; a sweep writes only results/NAME.json.

    Example: compactgpt experiment run shakespeare-quick
    """
    from compactgpt import experiments
    from compactgpt.data.hub import check_sources
    from compactgpt.forecast.estimate import announce_times

    runs = experiments.configurations(name, params_file, settings or [])
    is_sweep = bool(experiments.find_experiment(name).sweep)
    if not is_sweep:
        check_sources(runs[0])
        _check_corpus(runs[0].download, params_file)
    times = announce_times(runs)
    if not is_sweep:
        echo("\n".join(times))
        experiments.run(name, params_file, settings or [])
        metrics = read_json(METRICS)
        echo("our model, measured: loss {loss:.3f}, perplexity {perplexity:.2f}".format(**metrics))
        echo("The page: reports/index.html")
        echo(f"next: compactgpt experiment record {name}")
        return
    echo(times[0])
    from compactgpt.common.device import prepare_process

    prepare_process(runs[0].runtime.num_threads)  # before the next import, which loads torch
    from compactgpt.evaluation.sweep_runs import run_sweep
    from compactgpt.tracking import state_folder

    path = Path("results", f"{name}.json")
    run_sweep(name, params_file, settings or [], path, state_folder() / name, echo)
    echo(f"{path}: commit the file" + ("; next: compactgpt experiment fit" if name == "ladder" else ""))


def _check_corpus(download: Download, params_file: Path) -> None:
    """Check, before a run, that the hub answers if the stage `download` has to read its data set.

    Raises:
        BadConfig: the hub does not have the data set.
        Unreachable: the hub does not answer.
    """
    from compactgpt.data.hub import require_on_hub

    chosen = download.hub.sets[download.hub.name]
    has_copy = chosen.file is not None and os.path.lexists(chosen.file)
    if download.corpus != "hub" or download.hub.mirror is not None or has_copy or chosen.revision is None:
        return
    is_same = download == load_params(params_file).download
    if is_same and DOWNLOADED.exists() and read_json(DOWNLOADED)["corpus"] == "hub":
        return  # the stage has run with these values
    advice = "name a copy of the repository in download.hub.mirror"
    if chosen.file is not None:
        advice = f"bring the text: curl -fLo {chosen.file} {chosen.file_url}"
    require_on_hub("dataset", chosen.repo, chosen.revision, advice)


@experiment.command("record")
def record_experiment(name: ExperimentName) -> None:
    """Record the metrics of an experiment that has run, for the comparison.

    Prints the path of the file. Writes results/NAME.json.

    Example: compactgpt experiment record note
    """
    from compactgpt.reporting.results import record_result

    path = record_result(name)
    echo(f"{path}: commit the file; next: `dvc repro comparison` judges the claims about this experiment")


@experiment.command("fit")
def fit_experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a finished sweep.")] = "ladder",
    folder: Annotated[Path, typer.Option(help="The folder with NAME.json.")] = Path("results"),
    params_file: ParamsFile = PARAMS,
) -> None:
    """Fit a scaling law to the runs of a sweep, and predict the loss of params.yaml.

    Prints the law and the prediction. Writes the law to results/NAME.json.

    Example: compactgpt experiment fit ladder
    """
    from compactgpt.forecast.sweep import fit_sweep

    echo(fit_sweep(folder / f"{name}.json", params_file))


app.command("ladder", hidden=True)(fit_experiment)  # its name until version 0.2  # wording: quoted
