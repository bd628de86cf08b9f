"""The record as reports/index.html, and all files that are made from the record.

The page is one file: it needs no network, no script, no other file. Each language is an article of its own;
two radio buttons and a style rule show one of them. Plots are inline SVG whose colours are the page's
variables. Every number shows its source in place, and links to its row in the last table.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compactgpt.common.storage import json_bytes
from compactgpt.reporting.markdown import comparison
from compactgpt.reporting.messages import LANGUAGES, Language
from compactgpt.reporting.model_card import model_card
from compactgpt.reporting.plots import PLOTS, png, svg
from compactgpt.reporting.tables import (
    CLAIMS_COLUMNS,
    GROUP_OF,
    MEASURED_COLUMNS,
    PUBLISHED_COLUMNS,
    Record,
    View,
    csv_text,
)
from compactgpt.reporting.templating import html_environment

if TYPE_CHECKING:
    from markupsafe import Markup

RECORD = "evidence.json"
PAGE = "index.html"
MARKS = {"holds": "✓", "fails": "✗", "open": "?", "waits": "…"}
SECTIONS = {  # by whether the record is about the note
    True: ("table", "demo", "claims", "samples", "data", "sources"),
    False: ("demo", "samples", "data", "table", "claims", "sources"),
}
HASH_DIGITS = 10  # of a hash that a reader sees; evidence.json has all


def page(record: Record, default: Language = "en") -> str:
    """Render the record as one HTML file.

    Args:
        record: the comparison's.
        default: the language that is shown first.
    """
    views = [View(record, language) for language in LANGUAGES]
    return (
        html_environment()
        .get_template("report.html.j2")
        .render(
            views=views,
            default=default,
            title=View(record, default).title(),
            sections=SECTIONS[record["about_note"]],
            columns={"measured": MEASURED_COLUMNS, "published": PUBLISHED_COLUMNS, "claims": CLAIMS_COLUMNS},
            group_of=GROUP_OF,
            marks=MARKS,
            hash_digits=HASH_DIGITS,
            plot=_plot,
        )
    )


def _plot(view: View, name: str, label: str) -> "Markup":
    from markupsafe import Markup

    return Markup(svg(view.record, name, view.language, label))  # noqa: S704 (matplotlib escapes its text)


def published_files(record: Mapping[str, Any], language: Language) -> dict[str, bytes]:
    """Render the record.

    Args:
        record: the comparison's.
        language: of the Markdown, the pictures and the page's first view.

    Returns:
        Content by file name, the record itself among them.
    """
    content = json_bytes(record)
    record = json.loads(content)  # as every later reader finds it, its keys in their order
    return {
        RECORD: content,
        "comparison.md": comparison(record, language).encode(),
        "comparison.csv": csv_text(record).encode(),
        PAGE: page(record, language).encode(),
        "model_card.md": model_card(record).encode(),
        **{f"{name}.png": png(record, name, language) for name in PLOTS},
    }
