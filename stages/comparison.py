"""Stage `comparison`: judge the claims; write the record (reports/evidence.json), tables and pages."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from stages._runner import ParamsFile, Stage, TrackerName, new_app, open_stage

app = new_app()
ROOT, REPORTS = Path(), Path("reports")
SHOWN_SECTIONS = 5  # `--show` prints this number of sections of reports/comparison.md
LEAST_WIDTH = 140  # characters in a line; with fewer characters, rich cuts off numbers


@app.command()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    show: Annotated[bool, typer.Option("--show", help="Print the last run's tables; write nothing.")] = False,
    quote: Annotated[
        list[Path] | None, typer.Option(help="Replace the tables in this page; write nothing else.")
    ] = None,
    tracker: TrackerName = "mlflow",
) -> None:
    """Judge the claims of the note, and write the record, tables, plots, page and model card to reports/."""
    tracker = "none" if show or quote else tracker
    with open_stage("comparison", params_file, tracker, ("comparison",)) as stage:
        if show:
            _show()
        elif quote:
            _replace_tables(quote)
        else:
            _compare(stage)


def _compare(stage: Stage) -> None:
    from compactgpt.common.storage import write_bytes
    from compactgpt.reporting.evidence import build_record
    from compactgpt.reporting.pages import render_files
    from compactgpt.reporting.schemas import read_sources

    sources = read_sources(ROOT, REPORTS, Path("data"), Path("models"), stage.params)
    record = build_record(sources)
    for name, content in render_files(record, stage.params.comparison.language).items():
        write_bytes(REPORTS / name, content)
        stage.tracker.artifact(REPORTS / name, "reports")


def _show() -> None:
    """Print the beginning of reports/comparison.md: the answer and the first tables."""
    from rich.console import Console
    from rich.markdown import Markdown

    sections = (REPORTS / "comparison.md").read_text("utf-8").split("\n## ")
    text = "\n## ".join(sections[:SHOWN_SECTIONS]).replace("<br>", ", ")  # rich can't show HTML tags
    Console(width=max(shutil.get_terminal_size().columns, LEAST_WIDTH)).print(Markdown(text))


def _replace_tables(pages: list[Path]) -> None:
    from compactgpt.common.storage import read_json, write_text
    from compactgpt.reporting.pages import RECORD, render_quoted_tables, replace_tables

    tables = render_quoted_tables(read_json(REPORTS / RECORD))
    for page in pages:
        write_text(page, replace_tables(page.read_text("utf-8"), tables))


if __name__ == "__main__":
    app()
