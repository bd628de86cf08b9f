"""Run tasks with a neural model: predict the last word of a passage, and score WikiText.

Comments in `run_tasks` and `score_wikitext` define the scores.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.config import Source
from compactgpt.config import Tasks as Settings
from compactgpt.data.hub import fetch_file
from compactgpt.data.token_files import TokenFile, Window
from compactgpt.evaluation.likelihood import (
    Codec,
    NeuralModel,
    document_text,
    score_targets,
    strided_windows,
    target_nats,
)
from compactgpt.evaluation.metrics import finite_or_none, perplexity, ratio_interval, wilson
from compactgpt.evaluation.totals import Flags, Floats

if TYPE_CHECKING:
    import tiktoken
    import torch

# The paper of GPT-2 does not list its stop words: these are the 127 words of NLTK.
_STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves what which who whom this that these those am is are
was were be been being have has had having do does did doing a an the and but if or because as until while
of at by for with about against between into through during before after above below to from up down in out
on off over under again further then once here there when where why how all any both each few more most
other some such no nor not only own same so than too very s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
# `_WORD` matches a space and the word of four or more letters after it.
_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})(?![A-Za-z0-9_])")


@dataclass(frozen=True)
class Item:
    """A passage without its last word, and the last word."""

    context: str
    target: str  # the last word, with the space before the word


def fetch_source(source: Source) -> Path:
    """Return the path of a task's file, which is local or from the hub.

    Raises MissingInput for a missing file, and BadData for a SHA-256 other than that in params.yaml.
    """
    if source.path is None:
        advice = "set a local path in evaluation.tasks"
        path = fetch_file(str(source.repo), str(source.file), str(source.revision), advice)
    else:
        path = Path(source.path)
        if not path.is_file():
            raise MissingInput(f"{path} is missing: correct the path in evaluation.tasks, or remove the task")
    found = sha256_file(path)
    if found != source.sha256:
        raise BadData(
            f"{path} has SHA-256 {found}, evaluation.tasks expects {source.sha256}: correct the path or hash"
        )
    return path


def read_lambada(path: Path) -> list[Item]:
    """Return the passages of a LAMBADA file: JSON objects with the key `text`, one per line.

    Raises BadData if the file has another format.
    """
    items = []
    try:
        for line in path.read_text("utf-8").splitlines():
            context, target = json.loads(line)["text"].rsplit(" ", 1)
            items.append(Item(context, " " + target))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(
            f"{path} is not a LAMBADA file, which has one JSON object with `text` on each line ({error})"
        ) from error
    return items


def make_cloze(split: TokenFile, encoding: "tiktoken.Encoding", settings: Settings) -> list[Item]:
    """Return at most `cloze_items` passages whose last word occurs earlier in the passage.

    In LAMBADA, four of five passages repeat a word in this way.
    """
    candidates = [
        _candidates(document_text(split, encoding, index).decode(), name, settings.cloze_characters)
        for index, name in enumerate(split.document_ids)
    ]
    turns = zip_longest(*candidates)  # all first items, then all second items, ...; None: no more items
    items = (item for turn in turns for item in turn if item is not None)
    return list(islice(items, settings.cloze_items))


def _candidates(text: str, document: str, characters: int) -> Iterator[Item]:
    """Yield items from `text` in pseudorandom order. No two items have the same last word.

    An item's context has at most `characters` characters. `document` is the document's id.
    """

    def order(match: re.Match[str]) -> bytes:
        return hashlib.sha256(f"{document} {match.start()}".encode()).digest()

    used = set()
    for match in sorted(_WORD.finditer(text), key=order):
        start = text.find(" ", max(0, match.start() - characters)) + 1  # begin with a complete word
        context, word = text[start : match.start()], match[1]
        if len(context) < characters / 2 or word in used:
            continue
        if re.search(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])", context):
            used.add(word)
            yield Item(context, match[0])


def item_window(codec: Codec, item: Item, index: int, block_size: int) -> Window:
    """Return an item as a window whose targets are the tokens after the item's context."""
    tokens = codec.encode(item.context + item.target)
    context = len(codec.encode(item.context))  # encoded without the target, as in lm-evaluation-harness
    if not context:
        tokens, context = [codec.first_token, *tokens], 1
    targets = len(tokens) - context
    stream = np.array(tokens, np.int64)[-(block_size + 1) :]  # a long context loses its first tokens
    return Window(index, stream[:-1], stream[1:][-targets:])


def answer(model: NeuralModel, items: Sequence[Item]) -> list[Floats]:
    """Return an array for each passage, (T, 3), with a row for each of the T tokens of the last word.

    Column 0: the token's loss in nats. Column 1: 1 if the token is the most probable, else 0.
    Column 2: 1 if the token is the most probable after STOP_WORDS are excluded, else 0.
    """
    import torch
    from torch.nn.functional import cross_entropy

    codec = model.codec
    assert codec is not None
    decoded = [codec.decode([token]).strip().lower() for token in range(len(model.head))]
    is_stop_word = torch.tensor([word in STOP_WORDS for word in decoded], device=model.head.device)  # (V,)

    def score(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        nats = cross_entropy(logits, targets, reduction="none")  # (N,)
        is_likeliest = logits.argmax(1) == targets
        allowed = logits.masked_fill_(is_stop_word, -torch.inf)
        is_likeliest_allowed = allowed.argmax(1) == targets
        return torch.stack([nats, is_likeliest.float(), is_likeliest_allowed.float()], 1)  # (N, 3)

    windows = [item_window(codec, item, index, model.block_size) for index, item in enumerate(items)]
    scores = {window.document: values for window, values in score_targets(model, windows, score)}
    return [scores[index] for index in range(len(items))]


def answer_figures(items: Sequence[Item], nats: Floats, hits: Flags) -> dict[str, Any]:
    """Return a task's part of the report: accuracy, perplexity and correct answers.

    `nats`, (items,): loss of each right answer, summed over its tokens. `hits`, (items,): True if correct.
    """
    text = json.dumps([[item.context, item.target] for item in items], ensure_ascii=False)
    loss = ratio_interval(nats, np.ones(len(items)))
    return {
        "items": len(items),
        "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "accuracy": asdict(wilson(int(hits.sum()), len(items))),
        "perplexity": loss.map(perplexity).as_report(),
        "hits": "".join("1" if hit else "0" for hit in hits),
    }


# --- WikiText


def read_lines(path: Path) -> list[str]:
    """Return the lines of WikiText from Parquet or raw text. An empty line is "".

    Raises BadData if the file is neither Parquet nor UTF-8 text.
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
    """Return WikiText's pages, as in the hub's EleutherAI/wikitext_document_level. A title begins a page."""
    pages: list[list[str]] = [[]]
    for row in lines:
        line = row.removesuffix("\n")
        # Section headings become "== Section ==", so that only titles have the form "= Title =".
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


# Pairs (old string, new string), in the order of lm_eval/tasks/wikitext/preprocess_wikitext.py.
_MARKS = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_MARKS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
# Pairs (opening mark, closing mark), as regular expressions.
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
    """Return a model's results by the three protocols that publications call "WikiText perplexity".

    Raises BadConfig if the stride is longer than the context.
    """
    codec, context = model.codec, min(context, model.block_size)
    assert codec is not None
    if stride > context:
        raise BadConfig(
            f"evaluation.tasks.wikitext_stride ({stride}) is above the context of {context}: lower it"
        )
    # `no_overlap` and `strided` are the protocols of perplexity.md in transformers' documentation.
    stream = codec.encode("\n\n".join(lines))
    report: dict[str, Any] = {}
    for name, step in (("no_overlap", context), ("strided", stride)):
        scored = [values for _, values in target_nats(model, blocks(stream, context, step))]
        nats, tokens = sum(float(values.sum()) for values in scored), sum(map(len, scored))
        found = finite_or_none(perplexity(nats / tokens))
        report[name] = {"context": context, "stride": step, "own_tokens": tokens, "perplexity": found}
    return report | {"per_word": _score_words(model, codec, split_pages(lines), context)}


def blocks(stream: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Cut a stream into blocks that begin `stride` tokens apart. Each token but the first is scored once."""
    tokens, scored = np.array(stream, np.int64), 0
    for start in range(0, len(tokens), stride):
        end = min(start + context, len(tokens))
        first = max(scored, start + 1)  # index of this block's first target
        if first < end:
            yield Window(0, tokens[start : end - 1], tokens[first:end])
        scored = end  # later blocks use the tokens before `end` only as context
        if end == len(tokens):
            return


def _score_words(model: NeuralModel, codec: Codec, pages: Sequence[str], context: int) -> dict[str, Any]:
    """Return the perplexity per word, as in the task wikitext of lm-evaluation-harness."""
    encoded = ([codec.first_token, *codec.encode(detokenize(page))] for page in pages)
    streams = ((number, np.array(tokens, np.int64)) for number, tokens in enumerate(encoded))
    windows = strided_windows(streams, context, context)
    nats = sum(float(values.sum()) for _, values in target_nats(model, windows))
    # Count words before detokenization, which would change their number.
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    return {"context": context, "word_perplexity": finite_or_none(perplexity(nats / words))}


# --- all tasks


def run_tasks(
    model: NeuralModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    settings: Settings,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run all tasks of params.yaml and return their report."""
    tasks = {"cloze": make_cloze(split, encoding, settings)}
    # LAMBADA was published in two versions. `lambada_word` uses OpenAI's version, as the task lambada_openai
    # of lm-evaluation-harness does. `lambada_original` uses the authors' version (Paperno et al. 2016).
    for name, source in (("lambada_word", settings.lambada), ("lambada_original", settings.lambada_original)):
        if source is not None:
            tasks[name] = read_lambada(fetch_source(source))
    report: dict[str, Any] = {}
    progress(0, len(tasks))
    for done, (name, items) in enumerate(tasks.items(), 1):
        if items:  # `make_cloze` returns an empty list if no passage is suitable
            scores = answer(model, items)
            nats = np.array([each[:, 0].sum() for each in scores])
            # A word is right if each of its tokens is the most probable token.
            is_right = np.array([each[:, 1].all() for each in scores])
            report[name] = answer_figures(items, nats, is_right)
            if name == "lambada_word":
                # Radford et al. 2019, section 3.3: score a word's last token, and never predict a stop word.
                last_nats = np.array([each[-1, 0] for each in scores])
                is_last_right = np.array([each[-1, 2] > 0 for each in scores])
                report["lambada_last_token"] = answer_figures(items, last_nats, is_last_right)
        progress(done, len(tasks))
    for name, source in settings.wikitext.items():
        lines = read_lines(fetch_source(source))
        scored = score_wikitext(model, lines, settings.wikitext_context, settings.wikitext_stride)
        report[name] = {"sha256": source.sha256, **scored}
    return report
