"""The command `compactgpt`: what is asked of a project beside `dvc repro`.

Each command reads its options and makes one call into a room, which is imported only then: `--help` is quick.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compactgpt import __version__
from compactgpt.common.console import echo, handle_user_errors, report
from compactgpt.common.errors import CheckFailed, UserError

ParamsFile = Annotated[Path, typer.Option("--params", help="The numbers of the run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "-S", "--set-param", metavar="KEY=VALUE", help="As of `dvc exp run`; may stand several times."
    ),
]


def _names() -> list[str]:
    return sorted(path.stem for path in Path("conf/experiments").glob("*.yaml"))


ExperimentName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=_names, help="One of `compactgpt experiment list`.")
]
ModelFolder = Annotated[Path, typer.Option("--model", help="A model of ours.")]
TokenizerFolder = Annotated[Path, typer.Option("--tokenizer", help="Its tokenizer: goes along.")]
CardFile = Annotated[Path, typer.Option("--card", help="Its card, if it is of the same weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LadderFile = Annotated[Path, typer.Option(help="The finished small runs.")]

HELP = {"help_option_names": ["-h", "--help"]}  # of every command
app = typer.Typer(
    no_args_is_help=True,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    help="A compact GPT, measured against GPT-2: the pipeline itself is `dvc repro`.",
)


experiment = typer.Typer(no_args_is_help=True, help="Named experiments: conf/experiments.")
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
    """Commands of one project: run them from its root."""


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face form goes.")],
    model: ModelFolder = Path("models/compact"),
    tokenizer: TokenizerFolder = Path("data/tokenizer"),
    card: CardFile = Path("reports/model_card.md"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export that was changed since.")
    ] = False,
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Write a trained model and its card as transformers loads it (AutoModelForCausalLM.from_pretrained)."""
    with handle_user_errors():
        _export(folder, model, tokenizer, card, params_file, overwrite=overwrite)
        echo(f"{folder}: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


def _export(
    folder: Path, model: Path, tokenizer: Path, card: Path, params_file: Path, *, overwrite: bool = False
) -> None:
    from compactgpt.config import load_params
    from compactgpt.data.hub import with_base_model
    from compactgpt.model.huggingface import save_hf
    from compactgpt.reporting.model_card import read_card
    from compactgpt.training.checkpoint import load_model

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
    model: ModelFolder = Path("models/compact"),
    tokenizer: TokenizerFolder = Path("data/tokenizer"),
    card: CardFile = Path("reports/model_card.md"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Export a trained model and upload it to the Hugging Face hub (needs HF_TOKEN or `hf auth login`)."""
    with handle_user_errors(), tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        from compactgpt.common.storage import MANIFEST
        from compactgpt.data.hub import push_folder

        folder = Path(scratch) / "model"
        _export(folder, model, tokenizer, card, params_file)
        (folder / MANIFEST).unlink()  # ours, not Hugging Face's
        for path in sorted(folder.iterdir()):
            echo(f"{path.stat().st_size:>12,}  {path.name}")
        if dry_run:
            echo(f"nothing was uploaded; next: compactgpt push-to-hub {repo}")
            return
        echo(push_folder(folder, repo, private=private))


@app.command()
def gate(
    against: Annotated[
        str, typer.Option(help="An accepted reference (.json), any revision of git, or `champion`.")
    ] = "reports/accepted.json",
    accept: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Record these reports as the new reference; with --promote: accept another configuration.",
        ),
    ] = "",
    bench: Annotated[
        Path | None,
        typer.Option(help="What `benchmarks/training.py --json` wrote: throughput is judged too."),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="If it passes, register its model as MLflow's champion.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the verdict for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdict as JUnit XML.")] = None,
    as_json: AsJson = False,
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Has the model got worse than an accepted one? Exit code 3 says yes (docs/ci.md)."""
    with handle_user_errors():
        from compactgpt.config import load_params
        from compactgpt.gate import formats, references

        settings = load_params(params_file).regression
        if accept and not promote:
            references.accept(references.present(Path()), accept, Path(against), settings.max_documents)
            echo(f"{against}: accepted; commit it, so that it is reviewed like code")
            return
        verdict = references.compare(against, Path(), settings, bench)
        passed = not verdict.failures
        if as_json:
            echo(json.dumps({"passed": passed, **asdict(verdict)}, indent=2))
        else:
            echo(formats.terminal(verdict))
        formats.publish(verdict, markdown, junit)
        if not passed and not as_json:
            echo("next: compactgpt diff HEAD workspace, or compactgpt gate --accept REASON if it is meant")
        if not passed:
            raise typer.Exit(CheckFailed.exit_code)
        if promote:
            echo(f"champion: version {references.promote(Path(), accept)}")


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="A run's id (or its beginning), a revision of git.")],
    check: Annotated[bool, typer.Option("--check", help="Only say what would be missing.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the data again too.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the scratch work tree.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code of a run or branch without being asked.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a run again in a scratch work tree, compare every hash. Exit: 0 alike, 3 different, 66 can't."""
    with handle_user_errors():
        from compactgpt.tracking import reproduce

        def agree(plan: reproduce.Plan) -> bool:
            report("\n".join(plan.lines()))
            return trust or (sys.stdin.isatty() and typer.confirm("Run it?", err=True))

        found = reproduce.of(run, Path(), check=check, rebuild=rebuild, keep=keep, say=report, agree=agree)
        echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(found.lines()))
        if found.exit_code:
            raise typer.Exit(found.exit_code)
        if check and not as_json:
            echo(f"next: compactgpt reproduce {run}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A run's id (or its beginning), a revision, or `workspace`.")],
    b: Annotated[str, typer.Argument(help="The other.")] = "workspace",
    as_json: AsJson = False,
) -> None:
    """Explain two runs: parameters, data, code, environment, figures with paired significance."""
    with handle_user_errors():
        from compactgpt.tracking import compare_runs

        found = compare_runs.of(a, b, Path())
        echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(compare_runs.lines(found)))


@app.command()
def estimate(
    settings: Settings = None,
    measure: Annotated[bool, typer.Option(help="Also the time here, by a second of products.")] = False,
    as_json: AsJson = False,
    params_file: ParamsFile = Path("params.yaml"),
    ladder: LadderFile = Path("results/ladder.json"),
) -> None:
    """What would a run be? Size, time, memory and loss, before anything runs; nothing is written."""
    with handle_user_errors():
        from compactgpt.experiments import load_changed_params
        from compactgpt.forecast.estimate import estimate_configuration, format_estimate

        params = load_changed_params(params_file, settings or [])
        found = estimate_configuration(params, ladder, measure=measure)
        if as_json:
            echo(json.dumps(found, indent=2))
            return
        changes = [word for setting in settings or [] for word in ("-S", setting)]
        echo(format_estimate(found))
        if params_file == Path("params.yaml"):
            echo(f"next: {shlex.join(['dvc', 'exp', 'run', *changes]) if changes else 'make repro'}")


@experiment.command("list")
def list_experiments() -> None:
    """The named experiments: what each is for, and what it needs."""
    with handle_user_errors():
        from compactgpt.experiments import load_experiments

        for name, one in load_experiments().items():
            echo(f"{name:<14}{one.purpose}\n{'':<14}needs {one.needs}")
        echo("next: compactgpt experiment show NAME")


@experiment.command()
def show(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = Path("params.yaml")
) -> None:
    """What an experiment would change in params.yaml."""
    with handle_user_errors():
        from compactgpt import experiments

        echo("\n".join(experiments.describe(name, params_file, settings or [])))
        echo(f"next: compactgpt experiment run {name} (or apply, to look at params.yaml first)")


@experiment.command("apply")
def apply_experiment(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = Path("params.yaml")
) -> None:
    """Change params.yaml as an experiment says; `git checkout HEAD -- params.yaml` undoes it."""
    with handle_user_errors():
        from compactgpt import experiments

        told = experiments.apply(name, params_file, settings or [])
        echo("\n".join(told) or f"{params_file} says so already")
        echo(f"next: make repro; git checkout HEAD -- {params_file} undoes it")


@experiment.command("run")
def run_experiment(
    name: ExperimentName, settings: Settings = None, params_file: ParamsFile = Path("params.yaml")
) -> None:
    """Apply an experiment and run it as DVC runs experiments; a sweep runs in scratch folders."""
    with handle_user_errors():
        from compactgpt import experiments
        from compactgpt.forecast.estimate import announce_times

        runs = experiments.configurations(name, params_file, settings or [])
        echo("\n".join(announce_times(runs, Path())))
        done = experiments.run(name, params_file, settings or [])
        echo("\n".join(done))
        echo(f"next: compactgpt {'ladder' if len(done) > 1 else 'experiment record'} {name}")


@experiment.command("record")
def record_experiment(name: ExperimentName) -> None:
    """Keep what reports/ says of an experiment's run: results/NAME.json, read by the comparison."""
    with handle_user_errors():
        from compactgpt.reporting.results import record_result

        path = record_result(name)
        echo(f"{path}: commit it, then `dvc repro comparison` judges the claims that wait for it")


@app.command()
def ladder(
    name: Annotated[str, typer.Argument(help="The sweep whose runs are the rungs.")] = "ladder",
    folder: Annotated[Path, typer.Option(help="Where ladder.json and ladder.png go.")] = Path("results"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Gather the runs of a sweep, fit a scaling law to them, and extrapolate to params.yaml."""
    with handle_user_errors():
        from compactgpt.experiments import experiment_ref, find_experiment, read_experiment_file, run_names
        from compactgpt.forecast.sweep import fit_sweep

        def read_file(run: str, path: str) -> str:
            return read_experiment_file(experiment_ref(run), path)

        echo(fit_sweep(run_names(name, find_experiment(name)), read_file, folder, params_file))


@app.command()
def sync(
    warn: Annotated[
        bool, typer.Option("--warn", help="Only warn where MLflow fails: what `make repro` ends with.")
    ] = False,
) -> None:
    """Copy to MLflow what it lacks of the runs that have ended here: every `make repro` ends so."""
    with handle_user_errors():
        from compactgpt.tracking.mlflow_logger import sync as copy

        try:
            copy(Path.cwd(), record_unrun=True)
        except UserError as error:
            if not warn:
                raise
            report(f"warning: {error}")
            return
        echo("MLflow has all of the runs that have ended here")


@app.command()
def check(params_file: ParamsFile = Path("params.yaml")) -> None:
    """Check params.yaml and the files that DVC is about to read: every `make repro` begins so."""
    with handle_user_errors():
        from compactgpt.data.inputs import check_inputs

        check_inputs(Path(), params_file)
        echo("params.yaml is valid, and DVC can read every dependency")


@app.command()
def repair() -> None:
    """Restore dvc.lock if DVC was killed while it wrote the file: every `make repro` begins so."""
    with handle_user_errors():
        from compactgpt.tracking.dvc_files import restore_lock

        if restore_lock(Path()):
            echo("dvc.lock was incomplete, since DVC was killed: restored as the last stage found it")


app.command("mend", hidden=True)(repair)  # its name until version 0.4


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Is every file what dvc.lock says, and every number what the inputs give? Exit code 3 if one differs."""
    with handle_user_errors():
        from compactgpt.reporting.verify import verify as look

        found = look(Path())
        echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))
        if found.differences:
            raise typer.Exit(CheckFailed.exit_code)


@app.command()
def trace(
    name: Annotated[str, typer.Argument(help="A value of reports/evidence.json.")], as_json: AsJson = False
) -> None:
    """Where does a number come from? Report, stage, what it read, commit, MLflow run."""
    with handle_user_errors():
        from compactgpt.common.storage import read_json
        from compactgpt.reporting.provenance import RECORD, find_value
        from compactgpt.reporting.provenance import trace as chain
        from compactgpt.tracking.mlflow_logger import run_of_value

        record = read_json(RECORD)
        lines = chain(Path(), record, name)
        lines.append(("MLflow run", run_of_value(Path.cwd(), find_value(record, name)["stage"])))
        if as_json:
            facts: dict[str, list[str]] = {}
            for what, found in lines:  # a stage reads and writes several files
                facts.setdefault(what, []).append(found)
            echo(json.dumps({**facts, "evidence": find_value(record, name)}, indent=2))
        else:
            echo("\n".join(f"{what:<12}{found}" for what, found in lines))
