"""Render reports/comparison.md, and the tables that README.md contains."""

import re
from collections.abc import Mapping
from typing import Any

from compactgpt.reporting.messages import Language
from compactgpt.reporting.tables import MEASURED_COLUMNS, PUBLISHED_COLUMNS, Record, View
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


def replace_tables(page: str, tables: Mapping[str, str]) -> str:
    """Replace the named tables in a Markdown page and return the page.

    Args:
        page: Markdown; a table is between the lines `<!-- table NAME -->` and `<!-- end -->`.
        tables: the new Markdown tables by name. Tables with other names do not change.
    """

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n{found[3]}" if found[2] in tables else found[0]

    return _QUOTED.sub(replace, page)
