"""Commands that compare a run with another one."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import PARAMS, AsJson, ParamsFile
from compactgpt.common.console import echo, report
from compactgpt.common.errors import CheckFailed

app = typer.Typer()


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
