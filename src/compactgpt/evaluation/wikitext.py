"""Score WikiText by the three protocols whose numbers share one name.

- no_overlap: lines joined by two line ends, in blocks of the context, of which the first token is not scored.
  Nats per token (transformers, perplexity.md, with its stride equal to its length).
- strided: the same stream in blocks that move on by a stride; each scores what no block before it scored
  (the same page).
- per_word: each page without WikiText's own spacing, after end-of-text, all its tokens scored; nats over the
  words of the page as it was (EleutherAI's lm-evaluation-harness, task wikitext).
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.data.token_files import Window
from compactgpt.evaluation.likelihood import Codec, NeuralModel, strided_windows, target_nats
from compactgpt.evaluation.metrics import bits_per_byte, perplexity


def read_lines(path: Path) -> list[str]:
    """Read WikiText as the hub has it, a line a row: an empty line is empty, others end in a line end.

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
        raise BadData(f"{path} is not WikiText in parquet, JSON lines or raw text ({error})") from error
    return ["" if not line.strip() else line for line in text.splitlines(keepends=True)]


def split_pages(lines: Iterable[str]) -> list[str]:
    """Join lines to pages, each of which begins with its title (EleutherAI/wikitext_document_level)."""
    pages: list[list[str]] = [[]]
    for row in lines:
        line = row.removesuffix("\n")
        # Headings of sections become "== Section ==", so that only titles keep "= Title =".
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


# The replacements of lm_eval/tasks/wikitext/preprocess_wikitext.py, in its order.
_MARKS = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_MARKS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
_HEADINGS = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
_SPACES = [(" \xb0 ", "\xb0"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenize(page: str) -> str:
    """Undo WikiText's spacing, as lm-evaluation-harness does."""
    for old, new in _MARKS:
        page = page.replace(old, new)
    for left, right in _PAIRS:
        close = right.removeprefix("\\")
        page = re.sub(rf"{left}\s*([^{re.escape(close)}]*?)\s*{right}", rf"{left[-1]}\1{close}", page)
    for old, new in _HEADINGS + _SPACES:
        page = page.replace(old, new)
    return page


def score_wikitext(model: NeuralModel, lines: Sequence[str], context: int, stride: int) -> dict[str, Any]:
    """Return a model's figures by all three protocols; a shorter context of the model's own is used instead.

    Raises:
        BadConfig: the stride is above the context.
    """
    codec, context = model.codec, min(context, model.block_size)
    assert codec is not None
    if stride > context:
        raise BadConfig(f"evaluation.tasks.wikitext_stride ({stride}) is above the context of {context}")
    stream = codec.encode("\n\n".join(lines))  # one stream of the whole text, as perplexity.md has it
    report: dict[str, Any] = {}
    for name, step in (("no_overlap", context), ("strided", stride)):
        scored = [values for _, values in target_nats(model, blocks(stream, context, step))]
        nats, tokens = sum(float(values.sum()) for values in scored), sum(map(len, scored))
        report[name] = {
            "context": context, "stride": step, "own_tokens": tokens, "perplexity": math.exp(nats / tokens),
        }  # fmt: skip
    return report | {"per_word": _score_words(model, codec, split_pages(lines), context)}


def blocks(stream: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Cut one stream as transformers' perplexity.md does; the very first token is never scored."""
    tokens, scored = np.array(stream, np.int64), 0
    for start in range(0, len(tokens), stride):
        end = min(start + context, len(tokens))
        first = max(scored, start + 1)  # target of this block
        if first < end:
            yield Window(0, first, tokens[start : end - 1], tokens[first:end])
        scored = end  # later blocks only read these tokens, as context
        if end == len(tokens):
            return


def _score_words(model: NeuralModel, codec: Codec, pages: Sequence[str], context: int) -> dict[str, Any]:
    plain = map(detokenize, pages)
    streams = (
        (number, np.array([codec.first_token, *codec.encode(page)], np.int64))
        for number, page in enumerate(plain)
    )
    windows = strided_windows(streams, context, context)
    nats = sum(float(values.sum()) for _, values in target_nats(model, windows))
    # Of the pages as they were: the spacing that was undone must not change the number of words.
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page.encode()) for page in pages)
    return {
        "context": context,
        "pages": len(pages),
        "words": words,
        "bytes": size,
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": bits_per_byte(nats, size),
    }
