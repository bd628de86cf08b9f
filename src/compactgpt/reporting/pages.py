"""Render reports/evidence.json as an HTML page, Markdown, CSV, a model card and plots.

The HTML page is one file in two languages, without scripts.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactgpt.common.errors import printable
from compactgpt.common.storage import json_bytes, read_manifest
from compactgpt.reporting.claims import COMPACT
from compactgpt.reporting.plots import PLOTS, draw_png, draw_svg
from compactgpt.reporting.tables import COLUMNS, GROUPS, Record, View
from compactgpt.reporting.templating import LANGUAGES, Language, html_environment, markdown_environment

if TYPE_CHECKING:
    from markupsafe import Markup

RECORD = "evidence.json"
# Metric -> its name and unit in the model card.
CARD_METRICS = {
    "loss": "loss (nats per GPT-2 token)",
    "perplexity": "perplexity (per GPT-2 token)",
    "bits_per_byte": "bits per byte (of UTF-8)",
}
# The fields of a value (`Evidence`) that reports/comparison.csv contains.
CSV_VALUE = (
    "id", "value", "low", "high", "unit", "known", "corpus", "source", "context", "stride", "tokenizer",
    "stage", "report", "data_sha256", "weights_sha256", "code_sha256",
)  # fmt: skip
CSV_HEAD = ("table", "row", "column", "claim", "note", "verdict", "evidence", *CSV_VALUE[1:])
# A table in Markdown, between `<!-- table NAME -->` and `<!-- end -->`.
_QUOTED = re.compile(r"^(<!-- table ([\w-]+) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def render_files(record: Mapping[str, Any], language: Language) -> dict[str, bytes]:
    """Return a dict: name of a file in reports/ -> its content.

    Markdown and plots are in `language`. The HTML page opens in `language` and has both languages.
    """
    content = json_bytes(record)
    record = json.loads(content)  # with sorted keys, as in reports/evidence.json
    return {
        RECORD: content,
        "comparison.md": render_comparison(record, language).encode(),
        "comparison.csv": render_csv(record).encode(),
        "index.html": render_page(record, language).encode(),
        "model_card.md": render_model_card(record).encode(),
        **{f"{name}.png": draw_png(record, name, language) for name in PLOTS},
    }


def render_page(record: Record, default: Language = "en") -> str:
    """Render reports/evidence.json as one HTML page with all languages.

    The page opens in the language `default`.
    """
    from markupsafe import Markup

    def plot(view: View, name: str, label: str) -> "Markup":
        return Markup(draw_svg(view.record, name, view.language, label))  # noqa: S704 (matplotlib escapes)

    views = {language: View(record, language) for language in LANGUAGES}
    return html_environment().get_template("report.html.j2").render(
        view=views[default],
        views=views.values(),
        columns=COLUMNS,
        group_of={verdict: group for group, verdicts in GROUPS.items() for verdict in verdicts},
        plot=plot,
    )  # fmt: skip


def render_comparison(record: Record, language: Language = "en") -> str:
    """Render reports/evidence.json as reports/comparison.md."""
    template = markdown_environment().get_template("comparison.md.j2")
    return template.render(view=View(record, language), columns=COLUMNS).strip() + "\n"


def render_csv(record: Record) -> str:
    """Render reports/comparison.csv: the claims with their values, then all values of measured models."""
    view, buffer = View(record), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    cells = {
        row[column]: ("note", row["id"], column) for row in record["table"] for column in COLUMNS["note"]
    }
    for claim in record["claims"]:
        cell = cells.get(claim["id"], ("claims", "", ""))
        for item in view.known_items(claim) or [{}]:
            values = [item.get(key) for key in CSV_VALUE]
            writer.writerow([*cell, claim["id"], claim["quote"], claim["verdict"], *values])
    for model in view.models:
        for name, item in view.evidence.items():
            if name.startswith(f"{model}.") or name == f"ratio.{COMPACT}_to_{model}.perplexity":
                quantity, values = name.removeprefix(f"{model}."), [item[key] for key in CSV_VALUE]
                writer.writerow(["measured", model, quantity, "", "", "", *values])
    return buffer.getvalue()


def render_quoted_tables(record: Record) -> dict[str, str]:
    """Return the tables that README.md contains: name -> Markdown in English."""
    macros: Any = markdown_environment().get_template("macros.md.j2")
    macros = macros.make_module({"view": View(record), "columns": COLUMNS})
    names = ("note", "measured", "published")
    return {name: str(getattr(macros, f"{name}_table")()).strip() for name in names}


def replace_tables(page: str, tables: Mapping[str, str]) -> str:
    """Return a Markdown page in which the tables named in `tables` are replaced.

    `tables`: name -> Markdown of the new table. Tables with other names do not change.
    """

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n{found[3]}" if found[2] in tables else found[0]

    return _QUOTED.sub(replace, page)


def render_model_card(record: Record) -> str:
    """Render the compact model's Hugging Face card: YAML metadata, then English Markdown.

    The metadata follows huggingface.co/docs/hub/model-cards. Its values are JSON, which is valid YAML.
    """
    from markupsafe import Markup

    view, data = View(record), record["data"]
    corpus = printable(view.corpus)
    # A perplexity that is too large for a float is not in reports/evidence.json, so the card omits it.
    metrics = [
        {"type": metric, "name": name, "value": view.evidence[f"{COMPACT}.{metric}"]["value"]}
        for metric, name in CARD_METRICS.items()
        if f"{COMPACT}.{metric}" in view.evidence
    ]
    dataset = {
        "type": re.sub(r"[^\w.-]+", "-", corpus),
        "name": f"{corpus}, held-out documents",
        "split": "val",
    }
    task = {"type": "text-generation", "name": "Language modeling"}
    results = [{"task": task, "dataset": dataset, "metrics": metrics}]
    metadata: dict[str, Any] = {"tags": ["gpt2", "compactgpt", "from-scratch"]}
    if data["corpus"] == "hub":  # names of hub sources are owner/name/split: keep owner/name
        metadata["datasets"] = sorted({printable(one["name"].rpartition("/")[0]) for one in data["sources"]})
    metadata["model-index"] = [{"name": "compactgpt", "results": results}]
    as_json = {key: Markup(json_bytes(value).decode().strip()) for key, value in metadata.items()}  # noqa: S704
    template = markdown_environment().get_template("model_card.md.j2")
    return template.render(view=view, metadata=as_json, columns=COLUMNS).strip() + "\n"


def read_card(model: Path, card: Path) -> tuple[str, str]:
    """Return (text of the model card, ""), or ("", error message).

    It is an error if the card is missing, or describes other weights than those in the folder `model`.
    """
    if not card.is_file():
        return "", f"{card} is missing: run `dvc repro comparison` to create it"
    text = card.read_text(encoding="utf-8")
    named = re.search(r"SHA-256 of the weights as trained: `([0-9a-f]{64})`", text)
    if named is None or named[1] != read_manifest(model)["files"]["model.safetensors"]["sha256"]:
        return "", f"{card} does not describe the weights in {model}: run `dvc repro comparison`"
    return text, ""
