"""The record as reports/comparison.md, and the tables that README.md and docs/note.md quote."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compactgpt.reporting.claims import ByHand, Claim
from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import MEASURED_COLUMNS, PUBLISHED_COLUMNS, Record, View, show_interval
from compactgpt.reporting.templating import markdown_environment

COLUMNS = {"measured": MEASURED_COLUMNS, "published": PUBLISHED_COLUMNS}


def comparison(record: Record, language: Language = "en") -> str:
    """Render the record as reports/comparison.md."""
    template = markdown_environment().get_template("comparison.md.j2")
    return template.render(view=View(record, language), columns=COLUMNS).strip() + "\n"


def quoted_tables(record: Record) -> dict[str, str]:
    """Return the tables that README.md quotes, by name, in English."""
    macros: Any = (
        markdown_environment().get_template("macros.md.j2").make_module({"view": View(record, "en")})
    )
    tables = {
        "note": macros.note_table(),
        "measured": macros.measured_table(MEASURED_COLUMNS),
        "published": macros.published_table(PUBLISHED_COLUMNS),
    }
    return {name: str(table).strip() for name, table in tables.items()}


def claims_in_english(claims: Sequence[Claim]) -> str:
    """Return the table of docs/note.md: each claim with its quote, its translation and its range."""
    macros: Any = markdown_environment().get_template("macros.md.j2").make_module({"view": None})
    return str(macros.english_claims([_claim_row(claim) for claim in claims])).strip()


def _claim_row(claim: Claim) -> dict[str, str]:
    decided = "a human reading" if isinstance(claim.judged, ByHand) else claim.judged.by
    return {
        **{key: getattr(claim, key) for key in ("id", "quote", "english", "where", "quantity")},
        "range": show_interval(claim.low, claim.high, claim.unit) or "-",
        "decided_by": f"experiment {claim.experiment}" if claim.experiment else decided,
    }


_QUOTED = re.compile(r"^(<!-- table ([\w-]+) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def quote_tables(page: str, tables: Mapping[str, str]) -> str:
    """Renew the tables that a page quotes, so that they need no typing.

    Args:
        page: text with pairs of lines `<!-- table NAME -->` and `<!-- end -->`.
        tables: Markdown by name; a table of any other name stays.
    """

    def renewed(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n{found[3]}" if found[2] in tables else found[0]

    return _QUOTED.sub(renewed, page)
