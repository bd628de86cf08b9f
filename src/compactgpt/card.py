"""The record -> a model card in Hugging Face's form: Markdown behind YAML that the hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.rendering import CARD_COLUMNS, Record, View, pipe_table
from compactgpt.storage import MANIFEST, json_bytes, read_json

_METRICS = ("loss", "perplexity", "bits_per_byte")
_TITLES = {"loss": "nats per GPT-2 token", "perplexity": "per GPT-2 token", "bits_per_byte": "of UTF-8"}


def model_card(record: Record) -> str:
    """Render the record as the README.md of a model of ours, in English.

    The metadata follows huggingface.co/docs/hub/model-cards: JSON is YAML, so each key is one line of it.
    """
    view = View(record)
    front = "\n".join(
        f"{key}: {json_bytes(value).decode().strip() if isinstance(value, list) else value}"
        for key, value in _metadata(view).items()
    )
    weights = view.evidence["compact.loss"]["weights_sha256"]
    parts = [
        f"---\n{front}\n---",
        "# compactgpt, a small GPT-2",
        _description(view),
        f"SHA-256 of the weights as trained: `{weights}`.",
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```',
        "It continues text like its corpus, a little. It knows nothing, follows no instructions, and nothing "
        "was done to keep it from writing what it should not: for teaching and comparing only.",
        "## Training data",
        _data(view),
        "## Evaluation",
        pipe_table([view.words[key] for key in CARD_COLUMNS], view.measured_table(CARD_COLUMNS)),
        view.words["measured_note"].format(**view.counted()),
        f"Expected before training: {view.value('compact.expected_loss')}; found: "
        f"{view.value('compact.loss')} nats per token.",
        "## Where the numbers come from",
        view.words["page_colophon"],
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(view: View) -> dict[str, Any]:
    corpus = view.record["data"]["corpus"]
    metrics = [
        {
            "type": metric,
            "name": f"{metric.replace('_', ' ')} ({_TITLES[metric]})",
            "value": view.evidence[f"compact.{metric}"]["value"],
        }
        for metric in _METRICS
    ]
    result = {
        "task": {"type": "text-generation", "name": "Language modeling"},
        "dataset": {"type": corpus, "name": f"{corpus}, held-out documents", "split": "val"},
        "metrics": metrics,
    }
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
    """Name the data sets of the hub that the corpus was made from; its sources are `owner/name/split`."""
    if data["corpus"] != "hub":
        return {}
    return {"datasets": sorted({one["name"].rpartition("/")[0] for one in data["sources"]})}


def _description(view: View) -> str:
    shape = view.record["models"]["shape"]
    return (
        f"A GPT-2 of {view.value('compact.parameters.all_tensors')} parameters "
        f"({view.value('compact.parameters.non_embedding')} without embeddings): {shape['n_layer']} layers, "
        f"{shape['n_head']} heads, {shape['n_embd']} wide, context {view.value('compact.context')} tokens. "
        f"Trained from scratch on {view.value('compact.tokens_seen')} tokens of "
        f"{view.record['data']['corpus']}."
    )


def _data(view: View) -> str:
    data = view.record["data"]
    parts = [
        " ".join(filter(None, (one["name"], one["version"], f"({one['licence']})")))
        for one in data["sources"]
        if one["licence"]
    ]
    split = data["splits"]["train"]
    sentence = (
        f"{data['corpus']}: {view.number(split['documents'])} documents, "
        f"{view.number(split['tokens'])} GPT-2 tokens in the train split (SHA-256 `{split['sha256']}`)."
    )
    return sentence + (f" Sources and licences: {'; '.join(parts)}." if parts else "")


def card_for(model: Path, card: Path) -> tuple[str, str]:
    """The card of one model, where the written one is of the same weights.

    Args:
        model: folder of a model of ours.
        card: reports/model_card.md.

    Returns:
        The text and "", or "" and why there is none.
    """
    if not card.is_file():
        return "", f"{card} is missing (`dvc repro comparison` makes it)"
    text = card.read_text(encoding="utf-8")
    files: Mapping[str, Any] = read_json(model / MANIFEST)["files"]
    named = re.search(r"SHA-256 of the weights as trained: `([0-9a-f]{64})`", text)
    if named is None or named[1] != files["model.safetensors"]["sha256"]:
        return "", f"{card} is of other weights than {model}"
    return text, ""
