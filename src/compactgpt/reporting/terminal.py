"""The record as tables for a terminal."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from compactgpt.common.errors import printable
from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import Item, Record, View

TERMINAL_COLUMNS = (
    "model",
    "parameters_all",
    "parameters_non_embedding",
    "val_loss",
    "val_perplexity",
    "bits_per_byte",
    "ratio",
)


def terminal(record: Record, *, width: int, colour: bool, language: Language = "en") -> str:
    """Render the tables for a terminal: the note's only where the record is about the note.

    Args:
        record: the comparison's.
        width: of the terminal, in characters.
        colour: whether it understands ANSI styles.
        language: of the words.
    """
    from rich.console import Console
    from rich.text import Text

    view, buffer = View(record, language), io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    scores = view.measured_rows(TERMINAL_COLUMNS)
    measured = [[cell.text.replace(" (", "\n(") for cell in row] for row in scores]
    tables = [
        (view.say("measured", corpus=view.corpus), view.head(TERMINAL_COLUMNS), measured),
        (view.words["forecast"], view.forecast_head(), view.forecast_rows()),
    ]
    notes = [view.headline(), view.second_sentence()]
    if view.about_note:
        rows = [
            [
                title,
                *(_claim_lines(view, claim) for claim in claims),
                *(_value_line(view, item) for item in here),
            ]
            for title, claims, here in view.note_rows()
        ]
        console.print(_rich_table(view.words["table"], view.note_head(), rows, lined=True))
        notes.append(view.say("table_note", corpus=view.corpus))
    for title, head, rows in tables:
        console.print(_rich_table(title, head, rows))
    for note in filter(None, notes):
        console.print(Text(printable(note)))
    return buffer.getvalue()


def _claim_lines(view: View, claim: Mapping[str, Any]) -> str:
    """Return a cell of the note's table as lines: the claim, what is known, the verdict."""
    known = [_value_line(view, item) for item in view.known_items(claim)]
    words = view.translation(claim) or claim["quote"]
    quote = f"{view.words['quote_open']}{words}{view.words['quote_close']}"
    return "\n".join([quote, *known, view.verdict(claim)])


def _value_line(view: View, item: Item) -> str:
    """Return how a value is known, and the value."""
    return f"{view.known(item)}{view.words['colon']}{view.show(item)}"


def _rich_table(title: str, head: Sequence[str], rows: list[list[str]], *, lined: bool = False) -> Any:
    """Make a table whose numbers are neither cut nor broken."""
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    box = HEAVY_HEAD if lined else SIMPLE_HEAD
    table = Table(title=Text(printable(title)), title_justify="left", show_lines=lined, box=box)
    for name, cells in zip(head, zip(*rows, strict=True), strict=True):
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(Text(printable(name)), min_width=longest, overflow="fold")
    for row in rows:
        # Text, because quotes hold brackets, which are no markup
        table.add_row(*(Text(printable(cell, keep="\n")) for cell in row))
    return table
