"""Render reports/comparison.md, and the tables that README.md and docs/note.md contain."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compactgpt.reporting.claims import ByHand, Claim
from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import MEASURED_COLUMNS, PUBLISHED_COLUMNS, Record, View, show_interval
from compactgpt.reporting.templating import markdown_environment

_QUOTED = re.compile(r"^(<!-- table ([\w-]+) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def render_comparison(record: Record, language: Language = "en") -> str:
    """Render the record as reports/comparison.md."""
    template = markdown_environment().get_template("comparison.md.j2")
    columns = {"measured": MEASURED_COLUMNS, "published": PUBLISHED_COLUMNS}
    return template.render(view=View(record, language), columns=columns).strip() + "\n"


def render_quoted_tables(record: Record) -> dict[str, str]:
    """Return the tables that README.md contains, in English, by name."""
    macros: Any = markdown_environment().get_template("macros.md.j2").make_module({"view": View(record)})
    tables = {
        "note": macros.note_table(),
        "measured": macros.measured_table(MEASURED_COLUMNS),
        "published": macros.published_table(PUBLISHED_COLUMNS),
    }
    return {name: str(table).strip() for name, table in tables.items()}


def render_claims(claims: Sequence[Claim], record: Record) -> str:
    """Return the table of docs/note.md: each claim with its quote, translation and claimed interval.

    Args:
        claims: the claims of claims.yaml.
        record: the comparison's record, for what small runs show about a claim.
    """
    view = View(record)
    rows = []
    for claim in claims:
        decided = "a human reading" if isinstance(claim.judged, ByHand) else claim.judged.by
        rows.append(
            {
                **claim.model_dump(include={"id", "quote", "english", "where", "quantity"}),
                "range": show_interval(claim.low, claim.high, claim.unit) or "-",
                "decided_by": f"experiment {claim.experiment}" if claim.experiment else decided,
                "small_scale": view.small_scale(view.claims[claim.id]) if claim.id in view.claims else [],
            }
        )
    macros: Any = markdown_environment().get_template("macros.md.j2").make_module({"view": None})
    return str(macros.english_claims(rows)).strip()


def replace_tables(page: str, tables: Mapping[str, str]) -> str:
    """Replace the named tables in a Markdown page and return the page.

    Args:
        page: Markdown; a table is between the lines `<!-- table NAME -->` and `<!-- end -->`.
        tables: the new Markdown tables by name. Tables with other names do not change.
    """

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n{found[3]}" if found[2] in tables else found[0]

    return _QUOTED.sub(replace, page)
