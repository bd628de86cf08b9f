"""Score WikiText by three protocols: publications report the results of all three as "WikiText perplexity".

- no_overlap: the lines are joined with two newlines and cut into blocks of the context's length. The first
  token of each block is not scored. Perplexity is per token (transformers, perplexity.md, with a stride equal
  to the context).
- strided: the same tokens in overlapping blocks, each of which begins one stride after the previous block. A
  block scores only the tokens that no earlier block scored (transformers, perplexity.md).
- per_word: each page is detokenized and follows end-of-text, and all its tokens are scored. Perplexity is per
  word of the page before detokenization (EleutherAI's lm-evaluation-harness, task wikitext).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.data.token_files import Window
from compactgpt.evaluation.likelihood import Codec, NeuralModel, strided_windows, target_nats
from compactgpt.evaluation.metrics import bits_per_byte, finite_or_none, perplexity


def read_lines(path: Path) -> list[str]:
    """Return the lines of WikiText from Parquet with a column `text`, or from raw text.

    As in the hub's dataset, an empty line is "", and every other line ends with a newline. Raises BadData if
    the file has neither format.
    """
    content = path.read_bytes()
    try:
        if content.startswith(b"PAR1"):
            import pyarrow.parquet

            lines: list[str] = pyarrow.parquet.read_table(path)["text"].to_pylist()
            return lines
        text = content.decode("utf-8")
    except (ValueError, KeyError, OSError) as error:
        raise BadData(f"{path} is not WikiText in Parquet or raw text ({error})") from error
    return ["" if not line.strip() else line for line in text.splitlines(keepends=True)]


def split_pages(lines: Iterable[str]) -> list[str]:
    """Return the pages of WikiText; each page begins with its title (EleutherAI/wikitext_document_level)."""
    pages: list[list[str]] = [[]]
    for row in lines:
        line = row.removesuffix("\n")
        # Section headings become "== Section ==", so that only titles have the form "= Title =".
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


# The replacements of lm_eval/tasks/wikitext/preprocess_wikitext.py, in the same order.
_MARKS = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_MARKS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
_HEADINGS = [("= = = =", "===="), ("= = =", "==="), ("= =", "==")]
_SPACES = [(" \xb0 ", "\xb0"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenize(page: str) -> str:
    """Return a page without WikiText's extra spaces, as lm-evaluation-harness does."""
    for old, new in _MARKS:
        page = page.replace(old, new)
    for left, right in _PAIRS:
        close = right.removeprefix("\\")
        page = re.sub(rf"{left}\s*([^{re.escape(close)}]*?)\s*{right}", rf"{left[-1]}\1{close}", page)
    for old, new in _HEADINGS + _SPACES:
        page = page.replace(old, new)
    return page


def score_wikitext(model: NeuralModel, lines: Sequence[str], context: int, stride: int) -> dict[str, Any]:
    """Return a model's results for all three protocols.

    `context` and `stride` are in tokens; a model with a shorter context uses its own. Raises BadConfig if the
    stride is longer than the context.
    """
    codec, context = model.codec, min(context, model.block_size)
    assert codec is not None
    if stride > context:
        raise BadConfig(
            f"evaluation.tasks.wikitext_stride ({stride}) is above the context of {context}: lower it"
        )
    stream = codec.encode("\n\n".join(lines))  # as in perplexity.md
    report: dict[str, Any] = {}
    for name, step in (("no_overlap", context), ("strided", stride)):
        scored = [values for _, values in target_nats(model, blocks(stream, context, step))]
        nats, tokens = sum(float(values.sum()) for values in scored), sum(map(len, scored))
        found = finite_or_none(perplexity(nats / tokens))
        report[name] = {"context": context, "stride": step, "own_tokens": tokens, "perplexity": found}
    return report | {"per_word": _score_words(model, codec, split_pages(lines), context)}


def blocks(stream: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Yield the blocks of a stream as transformers' perplexity.md does; its first token is never scored."""
    tokens, scored = np.array(stream, np.int64), 0
    for start in range(0, len(tokens), stride):
        end = min(start + context, len(tokens))
        first = max(scored, start + 1)  # first target of this block
        if first < end:
            yield Window(0, first, tokens[start : end - 1], tokens[first:end])
        scored = end  # later blocks use the tokens before `end` only as context
        if end == len(tokens):
            return


def _score_words(model: NeuralModel, codec: Codec, pages: Sequence[str], context: int) -> dict[str, Any]:
    encoded = ([codec.first_token, *codec.encode(detokenize(page))] for page in pages)
    streams = ((number, np.array(tokens, np.int64)) for number, tokens in enumerate(encoded))
    windows = strided_windows(streams, context, context)
    nats = sum(float(values.sum()) for _, values in target_nats(model, windows))
    # Count words before detokenization, which would change their number.
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page.encode()) for page in pages)
    return {
        "context": context,
        "pages": len(pages),
        "words": words,
        "bytes": size,
        "word_perplexity": finite_or_none(perplexity(nats / words)),
        "bits_per_byte": bits_per_byte(nats, size),
    }
