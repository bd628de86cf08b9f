"""Commands that check results, and compare versions of the project."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compactgpt.commands.options import PARAMS, AsJson
from compactgpt.common.console import echo, echo_json, report
from compactgpt.common.errors import CheckFailed, MissingInput

ACCEPTED = "reports/accepted.json"
VERSION = "A git revision, the ID of an MLflow run or its first characters, or `workspace` (current files)."

app = typer.Typer()


def _show(found: Any, *, as_json: bool) -> None:
    """Print the result of a check, a dataclass with a method `lines`."""
    if as_json:
        echo_json(asdict(found))
    else:
        echo("\n".join(found.lines()))


@app.command()
def trace(name: Annotated[str, typer.Argument(help="The name of a value in reports/evidence.json.")]) -> None:
    """Show where a number comes from: report, stage, inputs, git commit and MLflow run.

    Example: compactgpt trace compact.loss
    """
    from compactgpt.common.storage import read_json
    from compactgpt.reporting import provenance
    from compactgpt.tracking.store import run_of_value

    value = provenance.find_value(read_json(provenance.RECORD), name)
    lines = provenance.trace(Path(), value)
    lines.append(("MLflow run", run_of_value(Path.cwd(), value["stage"])))
    echo("\n".join(f"{what:<12}{found}" for what, found in lines))


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Compare the files with dvc.lock, and compute every reported number again.

    Prints each difference. A difference gives exit code 3.
    Example: compactgpt verify
    """
    from compactgpt.reporting.verify import verify as verify_project

    found = verify_project(Path())
    _show(found, as_json=as_json)
    if found.differences:
        raise typer.Exit(CheckFailed.exit_code)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help=VERSION)],
    b: Annotated[str, typer.Argument(help="The other version.")] = "workspace",
    as_json: AsJson = False,
) -> None:
    """Compare the parameters, data, code, environment and metrics of two versions.

    Prints the differences, and whether a metric's difference may be random.
    Example: compactgpt diff HEAD~1 workspace
    """
    from compactgpt.tracking import compare_runs

    found = compare_runs.compare(a, b, Path())
    _show(found, as_json=as_json)


@app.command()
def gate(
    against: Annotated[
        str, typer.Option(help="Reference: a .json file, git revision or `champion`.")
    ] = ACCEPTED,
    accept: Annotated[
        str, typer.Option(metavar="REASON", help="Make the metrics in reports/ the reference; say why.")
    ] = "",
    bench: Annotated[
        Path | None, typer.Option(help="Check the training speed that benchmarks/training.py --json wrote.")
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="If the gate passes, make the model champion in MLflow.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="A Markdown file to write.")] = None,
    junit: Annotated[Path | None, typer.Option(help="A JUnit XML file to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the model against an accepted model.

    A metric worse than its limit gives exit code 3.
    --accept without --promote checks nothing: it writes the present metrics to the file of --against.
    Example: compactgpt gate --against HEAD~1
    """
    from compactgpt.config import load_params
    from compactgpt.gate import formats, references

    settings = load_params(PARAMS).regression
    if accept and not promote:
        references.accept(references.read_present(Path()), accept, Path(against), settings.max_documents)
        echo(f"{against} is the new reference: commit the file")
        return
    verdict = references.compare(against, Path(), settings, bench)
    passed = not verdict.failures
    if as_json:
        echo_json({"passed": passed, **asdict(verdict)})
    else:
        echo(formats.render_terminal(verdict))
    formats.publish(verdict, markdown, junit)
    if not passed:
        if not as_json:
            echo("next: compactgpt diff HEAD workspace")
            echo(f"to make this model the reference in {ACCEPTED}: compactgpt gate --accept REASON")
        raise typer.Exit(CheckFailed.exit_code)
    if promote:
        echo(f"version {references.promote(Path(), accept)} is the champion")


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help=VERSION)],
    check: Annotated[bool, typer.Option("--check", help="Only list the inputs that are missing.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run the version's code without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a version again in a temporary folder, and compare every output.

    A difference larger than rounding gives exit code 3.
    Example: compactgpt reproduce HEAD --check
    """
    from compactgpt.tracking import reproduce as tracking

    def confirm(plan: str) -> bool:
        report(plan)
        return trust or (sys.stdin.isatty() and typer.confirm("Run this code?", err=True))

    if check:
        missing, notes = tracking.list_missing(run, Path())
        for line in notes:
            echo(f"  note: {line}")
        if missing:
            raise MissingInput(f"{run} can't be run again here: {'; '.join(missing)}")
        echo(f"{run} can be run again here\nnext: compactgpt reproduce {run}")
        return
    found = tracking.reproduce(run, Path(), report, confirm)
    _show(found, as_json=as_json)
    if found.verdict == tracking.DIFFERENT:
        raise typer.Exit(CheckFailed.exit_code)
