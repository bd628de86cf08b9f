"""All files that are made from the record: the comparison writes them, `verify` makes them anew."""

import json
from collections.abc import Mapping
from typing import Any

from compactgpt import rendering
from compactgpt.card import model_card
from compactgpt.charts import CHARTS, png
from compactgpt.page import html
from compactgpt.storage import json_bytes
from compactgpt.words import Language

RECORD = "evidence.json"
PAGE = "index.html"


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
        "comparison.md": rendering.markdown(record, language).encode(),
        "comparison.csv": rendering.csv_text(record).encode(),
        PAGE: html(record, language).encode(),
        "model_card.md": model_card(record).encode(),
        **{f"{name}.png": png(record, name, language) for name in CHARTS},
    }
