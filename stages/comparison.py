"""Door of compactgpt.comparison: reports, claims, published values -> evidence.json and what it shows."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from compactgpt.reporting.messages import Language
from stages._runner import ParamsFile, Stage, TrackerName, new_app, open_stage

app = new_app()


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    inputs: Annotated[
        Path, typer.Option(help="Folder of claims.yaml, published.yaml and the code.")
    ] = Path(),
    reports: Annotated[Path, typer.Option(help="The other stages' reports; ours go there.")] = Path(
        "reports"
    ),
    data: Annotated[Path, typer.Option(help="Folder of the sums by document.")] = Path("data"),
    models: Annotated[Path, typer.Option(help="Folder of our model.")] = Path("models"),
    show: Annotated[bool, typer.Option("--show", help="Only print the table of the last run.")] = False,
    quote: Annotated[
        list[Path] | None, typer.Option(help="Only renew the tables that this page quotes.")
    ] = None,
    tracker: TrackerName = "mlflow",
) -> None:
    """Regenerate the note's table from what is known."""
    if show or quote:
        tracker = "none"
    with open_stage("comparison", params_file, tracker, ("comparison",)) as stage:
        if show:
            _show(reports, stage.params.comparison.language)
        elif quote:
            _renew(quote, inputs, reports)
        else:
            _compare(stage, inputs, reports, data, models)


def _show(reports: Path, language: Language) -> None:
    from compactgpt.common.storage import read_json
    from compactgpt.reporting.html import RECORD
    from compactgpt.reporting.terminal import terminal

    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    colour = sys.stdout.isatty()
    typer.echo(terminal(read_json(reports / RECORD), width=width, colour=colour, language=language))


def _renew(pages: list[Path], inputs: Path, reports: Path) -> None:
    from compactgpt.common.sections import load_section
    from compactgpt.common.storage import read_json, write_text
    from compactgpt.reporting.claims import Claims
    from compactgpt.reporting.html import RECORD
    from compactgpt.reporting.markdown import claims_in_english, quote_tables, quoted_tables

    claims = load_section(inputs / "claims.yaml", Claims).claims
    tables = quoted_tables(read_json(reports / RECORD)) | {"claims": claims_in_english(claims)}
    for page in pages:
        write_text(page, quote_tables(page.read_text("utf-8"), tables))


def _compare(stage: Stage, inputs: Path, reports: Path, data: Path, models: Path) -> None:
    from compactgpt.common.storage import write_bytes
    from compactgpt.reporting.evidence import build_record
    from compactgpt.reporting.html import published_files
    from compactgpt.reporting.schemas import read_sources

    sources = read_sources(inputs, reports, data, models, stage.params.baseline.names)
    record = build_record(sources, stage.params.evaluation.likelihood)
    for name, content in published_files(record, stage.params.comparison.language).items():
        write_bytes(reports / name, content)
        stage.tracker.artifact(reports / name, "reports")


if __name__ == "__main__":
    app()
