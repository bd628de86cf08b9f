"""The record as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compactgpt.common.errors import printable
from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import SCORE_COLUMNS, SIZE_COLUMNS, Item, Record, View

if TYPE_CHECKING:
    from rich.console import Console

TERMINAL_COLUMNS = ("model", *SIZE_COLUMNS, *SCORE_COLUMNS, "ratio")


def print_tables(record: Record, console: "Console", language: Language = "en") -> None:
    """Print the tables; the note's table only if the record is about the note."""
    from rich.text import Text

    view = View(record, language)
    if view.about_note:
        rows = []
        for title, claims, here in view.note_rows():
            cells = [_claim_lines(view, claim) for claim in claims]
            rows.append([title, *cells, *(_value_line(view, item) for item in here)])
        console.print(_make_table(view.words["table"], view.note_head(), rows, lines=True))
    scores = [
        [cell.text.replace(" (", "\n(") for cell in row] for row in view.measured_rows(TERMINAL_COLUMNS)
    ]
    console.print(_make_table(view.say("measured", corpus=view.corpus), view.head(TERMINAL_COLUMNS), scores))
    console.print(_make_table(view.words["forecast"], view.forecast_head(), view.forecast_rows()))
    notes = [view.headline(), view.summary()]
    if view.about_note:
        notes.append(view.say("table_note", corpus=view.corpus))
    for note in filter(None, notes):
        console.print(Text(printable(note)))


def _claim_lines(view: View, claim: Mapping[str, Any]) -> str:
    """Return a cell of the note's table as lines: the claim, what is known, the verdict."""
    known = [_value_line(view, item) for item in view.known_items(claim)]
    return "\n".join([view.quoted(claim), *known, view.verdict(claim)])


def _value_line(view: View, item: Item) -> str:
    return f"{view.known(item)}{view.words['colon']}{view.show(item)}"


def _make_table(title: str, head: Sequence[str], rows: list[list[str]], *, lines: bool = False) -> Any:
    """Return a table whose numbers are neither cut nor broken."""
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    box = HEAVY_HEAD if lines else SIMPLE_HEAD
    table = Table(title=Text(printable(title)), title_justify="left", show_lines=lines, box=box)
    for name, cells in zip(head, zip(*rows, strict=True), strict=True):
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(Text(printable(name)), min_width=longest, overflow="fold")
    for row in rows:
        # Text, because quotes hold brackets, which rich would take for its own markup
        table.add_row(*(Text(printable(cell, keep="\n")) for cell in row))
    return table
