"""The record as reports/index.html, and all files that are made from the record.

The page is one file: it needs no network, no script and no other file. Each language is an <article>; two
radio buttons and a style rule show one of them. Plots are inline SVG whose colours are the page's variables.
Every number shows its source in place, and links to its row in the last table.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compactgpt.common.storage import json_bytes
from compactgpt.reporting.markdown import render_comparison
from compactgpt.reporting.messages import LANGUAGES, Language
from compactgpt.reporting.model_card import render_model_card
from compactgpt.reporting.plots import PLOTS, draw_png, draw_svg
from compactgpt.reporting.tables import (
    CLAIMS_COLUMNS,
    GROUPS,
    MEASURED_COLUMNS,
    PUBLISHED_COLUMNS,
    Record,
    View,
    render_csv,
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
HASH_DIGITS = 10  # of a hash on the page; evidence.json has all of them


def render_page(record: Record, default: Language = "en") -> str:
    """Render the record as one HTML file.

    Args:
        record: the comparison's.
        default: the language that is shown first.
    """
    template = html_environment().get_template("report.html.j2")
    return template.render(
        views=[View(record, language) for language in LANGUAGES],
        default=default,
        title=View(record, default).title(),
        sections=SECTIONS[record["about_note"]],
        columns={"measured": MEASURED_COLUMNS, "published": PUBLISHED_COLUMNS, "claims": CLAIMS_COLUMNS},
        group_of={verdict: group for group, verdicts in GROUPS.items() for verdict in verdicts},
        marks=MARKS,
        hash_digits=HASH_DIGITS,
        plot=_draw_plot,
    )


def _draw_plot(view: View, name: str, label: str) -> "Markup":
    from markupsafe import Markup

    return Markup(draw_svg(view.record, name, view.language, label))  # noqa: S704 (matplotlib escapes its text)


def render_files(record: Mapping[str, Any], language: Language) -> dict[str, bytes]:
    """Render the record as all of the comparison's files.

    Args:
        record: the comparison's.
        language: of the Markdown, the pictures and the page's first view.

    Returns:
        Content by file name, the record itself included.
    """
    content = json_bytes(record)
    record = json.loads(content)  # with sorted keys, as all later readers of the file have it
    return {
        RECORD: content,
        "comparison.md": render_comparison(record, language).encode(),
        "comparison.csv": render_csv(record).encode(),
        PAGE: render_page(record, language).encode(),
        "model_card.md": render_model_card(record).encode(),
        **{f"{name}.png": draw_png(record, name, language) for name in PLOTS},
    }
