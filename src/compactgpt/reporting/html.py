"""Render the record as reports/index.html and as all other files of the comparison.

The page is one file that needs no network, no script and no other file. Each language is an <article>. Two
radio buttons and a CSS rule select the visible <article>. Plots are inline SVG and use the page's CSS
variables as colours. Every number shows its source, and links to its row in the page's last table.
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
MARKS = {"holds": "✓", "repeats": "=", "fails": "✗", "open": "?", "waits": "…"}
SECTIONS = {  # sections in their order; True: for a record whose corpus is one that the note is about
    True: ("table", "demo", "claims", "samples", "data", "sources"),
    False: ("demo", "samples", "data", "table", "claims", "sources"),
}
HASH_DIGITS = 10  # digits of a hash that the page shows; evidence.json has the full hash


def render_page(record: Record, default: Language = "en") -> str:
    """Render the record as one HTML file.

    Args:
        record: the comparison's record.
        default: the language that is visible when the page opens.
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
    """Render all files of the comparison.

    Args:
        record: the comparison's record.
        language: the language of the Markdown and the plots, and the first visible language of the page.

    Returns:
        The content of each file by file name, including the record itself.
    """
    content = json_bytes(record)
    record = json.loads(content)  # sort the keys, as in the written file
    return {
        RECORD: content,
        "comparison.md": render_comparison(record, language).encode(),
        "comparison.csv": render_csv(record).encode(),
        PAGE: render_page(record, language).encode(),
        "model_card.md": render_model_card(record).encode(),
        **{f"{name}.png": draw_png(record, name, language) for name in PLOTS},
    }
