"""Commands that show what a run produced."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.commands.options import AsJson
from compactgpt.common.console import echo
from compactgpt.common.errors import CheckFailed

app = typer.Typer()


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
