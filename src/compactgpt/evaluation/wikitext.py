"""WikiText by the three protocols whose numbers go by one name; context, stride and unit are part of each.

- no_overlap: lines joined by two line ends, in blocks of the context; the first token of a block is not
  scored. Nats per token (transformers, perplexity.md, with its stride equal to its length).
- strided: the same stream, blocks that move on by a stride; each scores what none before it scored
  (the same page).
- per_word: each page without WikiText's own spacing, behind end-of-text, all its tokens scored; nats over
  the words of the page as it was (EleutherAI's lm-evaluation-harness, task wikitext).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.data.token_files import Window
from compactgpt.evaluation.likelihood import Neural, Stream, strided_windows, target_nats
from compactgpt.evaluation.metrics import bits_per_byte, perplexity


def read_lines(path: Path) -> list[str]:
    """Read WikiText in the hub's form, a line a row: an empty line is empty, others end in a line end.

    Takes .parquet and .jsonl (column `text`) and the raw text.

    Raises:
        BadData: another form.
    """
    content = path.read_bytes()
    try:
        if content.startswith(b"PAR1"):
            import pyarrow.parquet

            lines: list[str] = pyarrow.parquet.read_table(path)["text"].to_pylist()
            return lines
        text = content.decode("utf-8")
        if text.startswith("{"):
            return [json.loads(line)["text"] for line in text.splitlines()]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise BadData(f"{path} is no WikiText in parquet, JSON lines or raw text ({error})") from error
    return ["" if not line.strip() else line for line in text.splitlines(keepends=True)]


def blocks(stream: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Cut one stream as transformers' perplexity.md does; the very first token is never scored."""
    tokens, scored = np.array(stream, np.int64), 0
    for start in range(0, len(tokens), stride):
        end = min(start + context, len(tokens))
        first = max(scored, start + 1)
        if first < end:
            yield Window(0, first, tokens[start : end - 1], tokens[first:end])
        scored = end
        if end == len(tokens):
            return


def pages(lines: Iterable[str]) -> list[str]:
    """Join lines to pages, each opened by its title: EleutherAI/wikitext_document_level."""
    found: list[list[str]] = [[]]
    for row in lines:
        line = row.removesuffix("\n")
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [page for page in map("\n".join, found) if page.strip()]


# In the order of lm_eval/tasks/wikitext/preprocess_wikitext.py.
_PLAIN: tuple[tuple[str, str], ...] = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PLAIN += tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
_LAST: tuple[tuple[str, str], ...] = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \xb0 ", "\xb0"),
    (" \n", "\n"),
    ("\n ", "\n"),
)
_LAST += ((" N ", " 1 "), (" 's", "'s"))


def detokenize(page: str) -> str:
    """Undo WikiText's spacing, as the harness does."""
    for old, new in _PLAIN:
        page = page.replace(old, new)
    for left, right in _PAIRS:
        inside = right.removeprefix("\\")
        page = re.sub(rf"{left}\s*([^{re.escape(inside)}]*?)\s*{right}", rf"{left[-1]}\1{inside}", page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def score_wikitext(model: Neural, lines: Sequence[str], context: int, stride: int) -> dict[str, Any]:
    """Measure a model by all three protocols.

    Args:
        model: with a codec.
        lines: see `read_lines`.
        context: tokens, or the model's own if that is less.
        stride: tokens, of the strided protocol.

    Raises:
        BadConfig: the model has no tokenizer here, or the stride is not below its context.
    """
    if model.codec is None:
        raise BadConfig(f"{model.facts.get('kind')} has no tokenizer here, so WikiText can't be scored")
    context = min(context, model.block_size)
    if stride > context:
        raise BadConfig(f"evaluation.tasks.wikitext_stride ({stride}) is above the context of {context}")
    stream = model.codec.encode("\n\n".join(lines))
    whole = {"no_overlap": context, "strided": stride}
    report = {
        name: _per_token(model, blocks(stream, context, step), context, step) for name, step in whole.items()
    }
    report["per_word"] = _per_word(model, pages(lines), context)
    return report


def _per_token(model: Neural, windows: Iterable[Window], context: int, stride: int) -> Mapping[str, Any]:
    nats, tokens = 0.0, 0
    for _, values in target_nats(model, windows):
        nats, tokens = nats + float(values.sum()), tokens + len(values)
    return {"context": context, "stride": stride, "own_tokens": tokens, "perplexity": math.exp(nats / tokens)}


def _per_word(model: Neural, texts: Sequence[str], context: int) -> Mapping[str, Any]:
    codec = model.codec
    assert codec is not None
    streams: Iterator[Stream] = (
        (place, np.array([codec.first_token, *codec.encode(detokenize(text))], np.int64))
        for place, text in enumerate(texts)
    )
    windows = strided_windows(streams, context, context)
    nats = sum(float(values.sum()) for _, values in target_nats(model, windows))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "context": context,
        "pages": len(texts),
        "words": words,
        "bytes": size,
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": bits_per_byte(nats, size),
    }
