"""Stage `comparison`: judge the claims of claims.yaml; write reports/evidence.json, tables and pages."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages._runner import Stage, TrackerName, new_app, open_stage

if TYPE_CHECKING:
    from compactgpt.reporting.tables import View
    from compactgpt.reporting.templating import Language

app = new_app()
ROOT, REPORTS = Path(), Path("reports")
LEAST_WIDTH = 140  # characters per line of `--show`; in shorter lines rich splits numbers
SHOWN_COLUMNS = ("model", "seen_context", "val_loss", "val_perplexity", "bits_per_byte", "ratio")


@app.command()
def main(
    show: Annotated[
        bool, typer.Option("--show", help="Print summary and tables of reports/evidence.json; write no file.")
    ] = False,
    quote: Annotated[
        list[Path] | None, typer.Option(help="Replace the tables in this page; write no other file.")
    ] = None,
    tracker: TrackerName = "mlflow",
) -> None:
    """Judge the claims of claims.yaml; write evidence.json, tables, plots, page and model card."""
    tracker = "none" if show or quote else tracker
    with open_stage("comparison", tracker, ("comparison",)) as stage:
        if show:
            _show(stage.params.comparison.language)
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


def _show(language: "Language") -> None:
    """Print the summary of reports/evidence.json, and two of its tables: claims and measured scores."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from compactgpt.common.errors import printable
    from compactgpt.common.storage import read_json
    from compactgpt.reporting.pages import RECORD
    from compactgpt.reporting.tables import View

    def text(content: str) -> Text:
        return Text(printable(content, keep="\n"))  # rich reads markup in a str, but not in a Text

    view = View(read_json(REPORTS / RECORD), language)
    note = (view.words["table" if view.about_note else "table_own"], view.note_head(), _note_rows(view))
    measured = (view.say("measured"), view.head(SHOWN_COLUMNS), _measured_rows(view))
    console = Console(width=max(shutil.get_terminal_size().columns, LEAST_WIDTH))
    console.print(text(f"{view.headline()} {view.summary()}\n"))
    for title, head, rows in (note, measured) if view.about_note else (measured, note):
        table = Table(title=text(title), title_justify="left", box=box.SIMPLE_HEAD, expand=True)
        for name in head:
            table.add_column(text(name))
        for row in rows:
            table.add_row(*map(text, row))
        console.print(table)


def _note_rows(view: "View") -> Iterator[list[str]]:
    """Yield rows of the claims table: title, one cell per claim, values of the model trained here."""
    for title, claims, here in view.note_rows():
        row = [title]
        for claim in claims:
            known = [f"{view.known_on(item)}: {view.show(item)}" for item in view.known_items(claim)]
            row.append("\n".join([view.quoted(claim), *known, view.verdict(claim)]))
        yield row + [f"{view.known_on(item)}: {view.show(item)}" for item in here]


def _measured_rows(view: "View") -> Iterator[list[str]]:
    """Yield the rows of the table of measured scores. Only the column `ratio` has confidence intervals."""
    from compactgpt.reporting.tables import COLUMNS

    for cells in view.measured_rows():
        row = {column: cell.text for column, cell in zip(COLUMNS["measured"], cells, strict=True)}
        for column in ("val_loss", "val_perplexity", "bits_per_byte"):
            row[column] = row[column].partition(" (")[0]
        yield [row[column] for column in SHOWN_COLUMNS]


def _replace_tables(pages: list[Path]) -> None:
    from compactgpt.common.storage import read_json, write_text
    from compactgpt.reporting.pages import RECORD, render_quoted_tables, replace_tables

    tables = render_quoted_tables(read_json(REPORTS / RECORD))
    for page in pages:
        write_text(page, replace_tables(page.read_text("utf-8"), tables))


if __name__ == "__main__":
    app()
