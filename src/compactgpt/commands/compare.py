"""Commands that compare two versions of the project."""

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
    a: Annotated[str, typer.Argument(help="An MLflow run ID or its start, a git revision, or `workspace`.")],
    b: Annotated[str, typer.Argument(help="The other version, in the same forms.")] = "workspace",
    as_json: AsJson = False,
) -> None:
    """Compare two versions: parameters, data, code, environment and metrics.

    Prints every difference, and for each metric whether the difference may be random. `workspace` is the
    current folder. Writes no file.

    Example: compactgpt diff HEAD~1 workspace
    """
    from compactgpt.tracking import compare_runs

    found = compare_runs.compare(a, b, Path())
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))


@app.command()
def gate(
    against: Annotated[
        str, typer.Option(help="The reference: an accepted file (.json), a git revision, or `champion`.")
    ] = "reports/accepted.json",
    accept: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Accept the current reports as the new reference. With --promote: accept a model whose "
            "configuration differs from the champion's.",
        ),
    ] = "",
    bench: Annotated[
        Path | None,
        typer.Option(
            help="Also check the throughput in this file, the output of benchmarks/training.py --json."
        ),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="If all metrics pass, register the model in MLflow as champion.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the result to this file as Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the result to this file as JUnit XML.")] = None,
    as_json: AsJson = False,
    params_file: ParamsFile = PARAMS,
) -> None:
    """Check that the model is not worse than an accepted model.

    Prints a line per metric. Writes the file of --against if --accept is given, and the files of --markdown
    and --junit. The exit code is 3 if a metric is worse by more than its tolerance and its random variation.

    Example: compactgpt gate --against HEAD~1
    """
    from compactgpt.config import load_params
    from compactgpt.gate import formats, references

    settings = load_params(params_file).regression
    if accept and not promote:
        references.accept(references.read_present(Path()), accept, Path(against), settings.max_documents)
        echo(f"{against} is the new reference: commit the file")
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
            echo("next: compactgpt diff HEAD workspace; compactgpt gate --accept REASON accepts the change")
        raise typer.Exit(CheckFailed.exit_code)
    if promote:
        echo(f"version {references.promote(Path(), accept)} is the champion")


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="An MLflow run ID or its start, or a git revision.")],
    check: Annotated[
        bool, typer.Option("--check", help="Run no stage: only list the inputs that are missing.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Also run the stages that make the data.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary checkout.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code of the version without asking for confirmation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a version again in a temporary checkout, and compare the hash of every output.

    Prints the comparison. Writes no file in this folder. The exit code is 0 if all hashes are equal, 3 if a
    hash differs, and 66 if the version can't run.

    Example: compactgpt reproduce HEAD --check
    """
    from compactgpt.tracking import reproduce as tracking

    def confirm(plan: str) -> bool:
        report(plan)
        return trust or (sys.stdin.isatty() and typer.confirm("Run this code?", err=True))

    found = tracking.reproduce(
        run, Path(), check=check, rebuild=rebuild, keep=keep, log=report, confirm=confirm
    )
    echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(found.lines()))
    if found.exit_code:
        raise typer.Exit(found.exit_code)
    if check and not as_json:
        echo(f"next: compactgpt reproduce {run}")
