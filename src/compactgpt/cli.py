"""The command `compactgpt`: what a user does with the project besides `dvc repro`.

Each command reads its options and calls one function of the library. It imports that function only then, so
that `--help` is quick.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compactgpt import __version__
from compactgpt.common.console import echo, handle_user_errors, report
from compactgpt.common.errors import CheckFailed, UserError

PARAMS = Path("params.yaml")


class Commands(TyperGroup):
    """A group of commands that prints a user's mistake as one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user gave."""
        with handle_user_errors():
            return super().invoke(ctx)


def _experiment_names() -> list[str]:
    return sorted(path.stem for path in Path("conf/experiments").glob("*.yaml"))


ParamsFile = Annotated[Path, typer.Option("--params", help="The file of parameters.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="Change a parameter; may be given again."),
]
ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=_experiment_names, help="See `compactgpt experiment list`."
    ),
]
Model = Annotated[Path, typer.Option("--model", help="The trained model.")]
Tokenizer = Annotated[Path, typer.Option("--tokenizer", help="The tokenizer of the model.")]
Card = Annotated[Path, typer.Option("--card", help="The model card; left out if it is of another model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

HELP = {"help_option_names": ["-h", "--help"]}  # for every command
app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=HELP, pretty_exceptions_enable=False)
experiment = typer.Typer(no_args_is_help=True, help="List, show, apply, run and record named experiments.")
app.add_typer(experiment, name="experiment")


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"compactgpt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a compact GPT, compare it with GPT-2, and show where every number comes from.

    `dvc repro` or `make repro` runs the pipeline; run these commands in the project's root folder.
    """


@app.command()
def check(params_file: ParamsFile = PARAMS) -> None:
    """Check params.yaml and the files that DVC reads, before a run.

    Prints one line. Writes nothing. `make repro` starts with it.

    Example: compactgpt check
    """
    from compactgpt.config import load_params
    from compactgpt.data.inputs import check_dependencies

    load_params(params_file)
    check_dependencies(Path())
    echo("params.yaml is valid, and DVC can read every dependency")


@app.command()
def estimate(
    settings: Settings = None,
    measure: Annotated[bool, typer.Option(help="Also measure this machine's speed, for a second.")] = False,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
    ladder: Annotated[Path, typer.Option(help="The runs of a sweep.")] = Path("results/ladder.json"),
) -> None:
    """Estimate a run before it starts: size, time, memory and loss.

    Prints a table. Writes nothing.

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


@app.command()
def gate(
    against: Annotated[
        str, typer.Option(help="An accepted reference (.json), a git revision, or `champion`.")
    ] = "reports/accepted.json",
    accept: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Write these reports as the new reference; with --promote: allow another configuration.",
        ),
    ] = "",
    bench: Annotated[
        Path | None,
        typer.Option(help="Also check the throughput in this file of benchmarks/training.py --json."),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="If the gate passes, register the model as MLflow's champion.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the verdict for a pull request here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict as JUnit XML here.")] = None,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Check that the model has not become worse than an accepted one.

    Prints a line per metric. Writes the file of --against with --accept, and those of --markdown and
    --junit. Exit code 3 if a metric is worse by more than its tolerance, and by more than chance.

    Example: compactgpt gate --against HEAD~1
    """
    from compactgpt.config import load_params
    from compactgpt.gate import formats, references

    settings = load_params(params_file).regression
    if accept and not promote:
        references.accept(references.read_present(Path()), accept, Path(against), settings.max_documents)
        echo(f"{against}: accepted; commit it, so that it is reviewed like code")
        return
    verdict = references.compare(against, Path(), settings, bench)
    passed = not verdict.failures
    if as_json:
        echo(json.dumps({"passed": passed, **asdict(verdict)}, indent=2))
    else:
        echo(formats.render_terminal(verdict))
    formats.publish(verdict, markdown, junit)
    if not passed:
        if not as_json:
            echo("next: compactgpt diff HEAD workspace, or compactgpt gate --accept REASON if it is intended")
        raise typer.Exit(CheckFailed.exit_code)
    if promote:
        echo(f"champion: version {references.promote(Path(), accept)}")


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Verify every file against dvc.lock, and compute every reported number again.

    Prints what differs. Writes nothing. Exit code 3 if anything differs.

    Example: compactgpt verify
    """
    from compactgpt.reporting.verify import verify as verify_project

    found = verify_project(Path())
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))
    if found.differences:
        raise typer.Exit(CheckFailed.exit_code)


@app.command()
def trace(
    name: Annotated[str, typer.Argument(help="A value of reports/evidence.json.")], as_json: AsJson = False
) -> None:
    """Show where a number comes from.

    Prints its report and stage, what the stage read and wrote, the commit and the MLflow run. Writes nothing.

    Example: compactgpt trace compact.loss
    """
    from compactgpt.common.storage import read_json
    from compactgpt.reporting.provenance import RECORD, find_value
    from compactgpt.reporting.provenance import trace as trace_value
    from compactgpt.tracking.store import run_of_value

    record = read_json(RECORD)
    lines = trace_value(Path(), record, name)
    lines.append(("MLflow run", run_of_value(Path.cwd(), find_value(record, name)["stage"])))
    if as_json:
        facts: dict[str, list[str]] = {}
        for what, found in lines:  # a stage reads and writes several files
            facts.setdefault(what, []).append(found)
        echo(json.dumps({**facts, "evidence": find_value(record, name)}, indent=2))
    else:
        echo("\n".join(f"{what:<12}{found}" for what, found in lines))


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A run's id or its beginning, a git revision, or `workspace`.")],
    b: Annotated[str, typer.Argument(help="The other version.")] = "workspace",
    as_json: AsJson = False,
) -> None:
    """Compare two runs or versions: parameters, data, code, environment, metrics.

    Prints what differs, and for metrics whether chance explains it. Writes nothing.

    Example: compactgpt diff HEAD~1 workspace
    """
    from compactgpt.tracking import compare_runs

    found = compare_runs.compare(a, b, Path())
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="A run's id or its beginning, or a git revision.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only list what is missing to reproduce it.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Also run the stages that make the data.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary checkout.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code of that version without asking.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a version again in a temporary checkout, and compare the hash of every output.

    Prints the comparison. Writes nothing here, unless with --keep. Exit code 0 if all hashes are equal, 3 if
    one differs, 66 if it can't run.

    Example: compactgpt reproduce HEAD --check
    """
    from compactgpt.tracking import reproduce as tracking

    def confirm(plan: str) -> bool:
        report(plan)
        return trust or (sys.stdin.isatty() and typer.confirm("Run it?", err=True))

    found = tracking.reproduce(
        run, Path(), check=check, rebuild=rebuild, keep=keep, log=report, confirm=confirm
    )
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))
    if found.exit_code:
        raise typer.Exit(found.exit_code)
    if check and not as_json:
        echo(f"next: compactgpt reproduce {run}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Model = Path("models/compact"),
    tokenizer: Tokenizer = Path("data/tokenizer"),
    card: Card = Path("reports/model_card.md"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export whose files have changed.")
    ] = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Export the trained model for transformers, with its tokenizer and model card.

    Prints how to load it. Writes the folder, complete or not at all.

    Example: compactgpt export exported
    """
    _export(folder, model, tokenizer, card, params_file, overwrite=overwrite)
    echo(f"{folder}: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


def _export(
    folder: Path, model: Path, tokenizer: Path, card: Path, params_file: Path, *, overwrite: bool = False
) -> None:
    from compactgpt.config import load_params
    from compactgpt.data.hub import with_base_model
    from compactgpt.model.huggingface import save_hf
    from compactgpt.model.weights import load_model
    from compactgpt.reporting.model_card import read_card

    text, why_none = read_card(model, card)
    if text and params_file.exists():
        text = with_base_model(text, load_params(params_file).training.init_from)
    save_hf(load_model(model), folder, tokenizer, text, overwrite=overwrite)
    if why_none:
        echo(f"without a model card: {why_none}")


@app.command("push-to-hub")
def push_to_hub(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    model: Model = Path("models/compact"),
    tokenizer: Tokenizer = Path("data/tokenizer"),
    card: Card = Path("reports/model_card.md"),
    params_file: ParamsFile = PARAMS,
) -> None:
    """Export the trained model and upload it to the Hugging Face hub.

    Needs HF_TOKEN or `hf auth login`. Prints the files and the address. Writes nothing here.

    Example: compactgpt push-to-hub me/compact-gpt --dry-run
    """
    from compactgpt.common.storage import MANIFEST
    from compactgpt.data.hub import push_folder

    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        folder = Path(scratch) / "model"
        _export(folder, model, tokenizer, card, params_file)
        (folder / MANIFEST).unlink()  # only this project reads it
        for path in sorted(folder.iterdir()):
            echo(f"{path.stat().st_size:>12,}  {path.name}")
        if dry_run:
            echo(f"nothing was uploaded; next: compactgpt push-to-hub {repo}")
        else:
            echo(push_folder(folder, repo, private=private))


@app.command()
def sync(
    warn: Annotated[bool, typer.Option("--warn", help="If MLflow fails, print a warning only.")] = False,
) -> None:
    """Copy to MLflow what it lacks of the runs that have ended here.

    Prints one line. Writes to the MLflow tracking server or mlflow.db. `make repro` ends with it.

    Example: compactgpt sync
    """
    from compactgpt.tracking.mlflow_logger import sync as sync_runs

    try:
        address = sync_runs(Path.cwd(), record_unrun=True)
    except UserError as error:
        if not warn:
            raise
        report(f"warning: {error}")
        return
    echo(f"MLflow at {address} has all of the runs that have ended here")


@app.command()
def repair() -> None:
    """Repair dvc.lock if DVC was killed while it wrote the file.

    Prints a line if there was something to repair. Writes dvc.lock. `make repro` starts with it.

    Example: compactgpt repair
    """
    from compactgpt.tracking.dvc_files import restore_lock

    if restore_lock(Path()):
        echo("dvc.lock was incomplete, since DVC was killed: restored as the last stage found it")


@experiment.command("list")
def list_experiments() -> None:
    """List the named experiments: what each is for, and what it needs.

    Prints the files of conf/experiments. Writes nothing.

    Example: compactgpt experiment list
    """
    from compactgpt.experiments import load_experiments

    for name, found in load_experiments().items():
        echo(f"{name:<14}{found.purpose}\n{'':<14}needs {found.needs}")
    echo("next: compactgpt experiment show NAME")


@experiment.command("show")
def show_experiment(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = PARAMS
) -> None:
    """Show what an experiment would change in params.yaml.

    Prints a line per parameter. Writes nothing.

    Example: compactgpt experiment show note
    """
    from compactgpt import experiments

    echo("\n".join(experiments.describe(name, params_file, settings or [])))
    echo(f"next: compactgpt experiment run {name} (or apply, to look at params.yaml first)")


@experiment.command("apply")
def apply_experiment(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = PARAMS
) -> None:
    """Change params.yaml to the values of an experiment.

    Prints a line per parameter. Writes params.yaml; its comments stay.

    Example: compactgpt experiment apply note -S training.max_steps=1000
    """
    from compactgpt import experiments

    changes = experiments.apply(name, params_file, settings or [])
    echo("\n".join(changes) or f"{params_file} has these values already")
    echo(f"next: make repro; git checkout HEAD -- {params_file} undoes it")


@experiment.command("run")
def run_experiment(name: ExperimentName, settings: Settings = None, params_file: ParamsFile = PARAMS) -> None:
    """Run an experiment with `dvc exp run`.

    Prints how long it may take, then what DVC prints. Writes params.yaml and the outputs of the pipeline; the
    runs of a sweep write DVC experiments only.

    Example: compactgpt experiment run shakespeare-quick
    """
    from compactgpt import experiments
    from compactgpt.forecast.estimate import announce_times

    runs = experiments.configurations(name, params_file, settings or [])
    echo("\n".join(announce_times(runs)))
    done = experiments.run(name, params_file, settings or [])
    echo("\n".join(done))
    echo(f"next: compactgpt experiment {'fit' if len(done) > 1 else 'record'} {name}")


@experiment.command("record")
def record_experiment(name: ExperimentName) -> None:
    """Record the metrics of an experiment that has run, for the comparison.

    Prints the file. Writes results/NAME.json.

    Example: compactgpt experiment record note
    """
    from compactgpt.reporting.results import record_result

    path = record_result(name)
    echo(f"{path}: commit it, then `dvc repro comparison` judges the claims that wait for it")


@experiment.command("fit")
def fit_experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A sweep that has run.")] = "ladder",
    folder: Annotated[Path, typer.Option(help="The folder of ladder.json.")] = Path("results"),
    params_file: ParamsFile = PARAMS,
) -> None:
    """Fit a scaling law to the runs of a sweep, and predict the loss of params.yaml.

    Prints the law and the prediction. Writes ladder.json.

    Example: compactgpt experiment fit ladder
    """
    from compactgpt.experiments import experiment_ref, find_experiment, read_experiment_file, run_names
    from compactgpt.forecast.sweep import fit_sweep

    def read_file(run: str, path: str) -> str:
        return read_experiment_file(experiment_ref(run), path)

    echo(fit_sweep(run_names(name, find_experiment(name)), read_file, folder / "ladder.json", params_file))


# The names until version 0.2.
app.command("mend", hidden=True)(repair)  # wording: quoted
app.command("ladder", hidden=True)(fit_experiment)
