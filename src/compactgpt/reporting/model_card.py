"""Render the record as a Hugging Face model card: YAML metadata, then Markdown."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.common.errors import printable
from compactgpt.common.storage import json_bytes, read_manifest
from compactgpt.reporting.tables import COMPACT, MEASURED_COLUMNS, PUBLISHED_COLUMNS, Record, View
from compactgpt.reporting.templating import markdown_environment

_METRICS = {
    "loss": "loss (nats per GPT-2 token)",
    "perplexity": "perplexity (per GPT-2 token)",
    "bits_per_byte": "bits per byte (of UTF-8)",
}


def render_model_card(record: Record) -> str:
    """Render the model card of the compact model, in English.

    The metadata follows huggingface.co/docs/hub/model-cards. JSON is valid YAML, so each value is written as
    JSON on one line.
    """
    from markupsafe import Markup

    view = View(record)
    metadata = {
        key: Markup(value if isinstance(value, str) else json_bytes(value).decode().strip())  # noqa: S704 (JSON)
        for key, value in _metadata(view).items()
    }
    template = markdown_environment().get_template("model_card.md.j2")
    columns = {"measured": MEASURED_COLUMNS, "published": PUBLISHED_COLUMNS}
    return template.render(view=view, metadata=metadata, columns=columns).strip() + "\n"


def _metadata(view: View) -> dict[str, Any]:
    corpus = printable(view.corpus)
    metrics = [
        {"type": metric, "name": name, "value": view.evidence[f"{COMPACT}.{metric}"]["value"]}
        for metric, name in _METRICS.items()
        if f"{COMPACT}.{metric}"
        in view.evidence  # the evidence has no perplexity that is too large for a float
    ]
    dataset = {
        "type": re.sub(r"[^\w.-]+", "-", corpus),
        "name": f"{corpus}, held-out documents",
        "split": "val",
    }
    task = {"type": "text-generation", "name": "Language modeling"}
    result = {"task": task, "dataset": dataset, "metrics": metrics}
    return {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "compactgpt", "from-scratch"],
        **_datasets(view.record["data"]),
        "model-index": [{"name": "compactgpt", "results": [result]}],
    }


def _datasets(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the Hugging Face data sets of the corpus, whose sources have the form `owner/name/split`."""
    if data["corpus"] != "hub":
        return {}
    return {"datasets": sorted({printable(one["name"].rpartition("/")[0]) for one in data["sources"]})}


def read_card(model: Path, card: Path) -> tuple[str, str]:
    """Read a model's card, if the card contains the hash of that model's weights.

    Args:
        model: the model's folder, with a manifest.
        card: the path of reports/model_card.md.

    Returns:
        The card and "", or "" and the reason why no card belongs to the model.
    """
    if not card.is_file():
        return "", f"{card} is missing: run `dvc repro comparison` to create it"
    text = card.read_text(encoding="utf-8")
    named = re.search(r"SHA-256 of the weights as trained: `([0-9a-f]{64})`", text)
    if named is None or named[1] != read_manifest(model)["files"]["model.safetensors"]["sha256"]:
        return "", f"{card} describes other weights than {model}: run `dvc repro comparison`"
    return text, ""
