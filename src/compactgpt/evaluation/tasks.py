"""Run the tasks of a neural model: predict the last word of a passage (LAMBADA and a cloze), and WikiText.

Publications report three different scores as "LAMBADA" (Paperno et al. 2016). Each has its own name here:

- lambada_word: OpenAI's text, the complete last word. An answer is correct if each token of the word is the
  most likely token. This is lambada_openai of EleutherAI's lm-evaluation-harness, with the same tokens.
- lambada_last_token: OpenAI's text, only the last token of the word. The model may not answer with a stop
  word, as in the GPT-2 paper (Radford et al. 2019, section 3.3). The paper does not list its stop words;
  STOP_WORDS is NLTK's list of 127 words.
- lambada_original: the authors' text, the complete last word.

The cloze has passages of the val split and is scored as lambada_word. Perplexity is exp of the mean nats of a
complete target. No token precedes a passage, as in lm-evaluation-harness.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.config import Source
from compactgpt.config import Tasks as Settings
from compactgpt.data.hub import fetch_file
from compactgpt.data.token_files import TokenFile, Window
from compactgpt.evaluation.likelihood import Codec, NeuralModel, document_text, score_targets
from compactgpt.evaluation.metrics import perplexity, ratio_interval, wilson
from compactgpt.evaluation.totals import Flags, Floats
from compactgpt.evaluation.wikitext import read_lines, score_wikitext

if TYPE_CHECKING:
    import tiktoken
    import torch

_STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves what which who whom this that these those am is are
was were be been being have has had having do does did doing a an the and but if or because as until while
of at by for with about against between into through during before after above below to from up down in out
on off over under again further then once here there when where why how all any both each few more most
other some such no nor not only own same so than too very s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
# A word of four or more letters after one space.
_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})(?![A-Za-z0-9_])")


@dataclass(frozen=True)
class Item:
    """A passage without its last word, and the last word."""

    context: str
    target: str  # with the space before it


def fetch_source(source: Source) -> Path:
    """Return the path of a task's file: a local file, or a file in the hub's standard cache.

    Raises MissingInput, Unreachable or BadConfig if there is no such file here or on the hub, and BadData if
    its SHA-256 is not the hash in params.yaml.
    """
    if source.path is None:
        advice = "set a local path in evaluation.tasks"
        path = fetch_file(str(source.repo), str(source.file), str(source.revision), advice)
    else:
        path = Path(source.path)
        if not path.is_file():
            raise MissingInput(f"{path} is missing: correct its path in evaluation.tasks, or set it to null")
    found = sha256_file(path)
    if found != source.sha256:
        raise BadData(
            f"{path} has SHA-256 {found}, evaluation.tasks expects {source.sha256}: correct file or hash"
        )
    return path


def read_lambada(path: Path) -> list[Item]:
    """Read the passages of a LAMBADA file: JSON lines with the key `text`. Raises BadData for another file.

    The target is the text after the last space.
    """
    items = []
    try:
        for line in path.read_text("utf-8").splitlines():
            context, target = json.loads(line)["text"].rsplit(" ", 1)
            items.append(Item(context, " " + target))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(
            f"{path} is not a LAMBADA file, one JSON object with `text` on each line ({error})"
        ) from error
    return items


def make_cloze(split: TokenFile, encoding: "tiktoken.Encoding", settings: Settings) -> list[Item]:
    """Return the items of the cloze, chosen from the documents of a split.

    A target is a word of four or more letters that occurs earlier in its passage, so the context helps; four
    of five targets of LAMBADA have this property. All documents have nearly the same weight, and a change of
    one document does not change the candidates of another.
    """
    candidates = [
        _candidates(document_text(split, encoding, index).decode(), name, settings.cloze_characters)
        for index, name in enumerate(split.document_ids)
    ]
    items: list[Item] = []
    # Each turn takes one item of each document, until the number is reached or no document has a candidate.
    while candidates and len(items) < settings.cloze_items:
        turn = [(document, next(document, None)) for document in candidates]
        items += [item for _, item in turn if item is not None]
        candidates = [document for document, item in turn if item is not None]
    return items[: settings.cloze_items]


def _candidates(text: str, document: str, characters: int) -> Iterator[Item]:
    """Yield the possible items of a document, in the order of a hash of their positions.

    Each target occurs in one item only.
    """

    def order(match: re.Match[str]) -> bytes:
        return hashlib.sha256(f"{document} {match.start()}".encode()).digest()

    used = set()
    for match in sorted(_WORD.finditer(text), key=order):
        start = text.find(" ", max(0, match.start() - characters)) + 1  # a passage begins with a whole word
        context, word = text[start : match.start()], match[1]
        if len(context) < characters / 2 or word in used:
            continue
        if re.search(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])", context):
            used.add(word)
            yield Item(context, match[0])


def item_window(codec: Codec, item: Item, index: int, block_size: int) -> Window:
    """Return an item as a window whose targets are the tokens after the context.

    As in lm-evaluation-harness, the number of context tokens is found by encoding the context alone.
    """
    tokens = codec.encode(item.context + item.target)
    context = len(codec.encode(item.context))
    if not context:
        tokens, context = [codec.first_token, *tokens], 1
    targets = len(tokens) - context
    stream = np.array(tokens, np.int64)[-(block_size + 1) :]  # cut at the start
    return Window(index, 0, stream[:-1], stream[1:][-targets:])


def answer(model: NeuralModel, items: Sequence[Item]) -> list[Floats]:
    """Score a model's prediction of the last word of every passage; each array is (T, 3), T target tokens.

    The columns are the nats of the token; whether it is the most likely token; whether it is the most likely
    token that is not a stop word.
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
    """Return a task's part of the report: accuracy, perplexity and whether each answer is correct.

    `nats` are those of each item's target, `hits` are True for correct answers; both are (items,). The
    report's `hits` has a 1 for each correct answer and a 0 for each other answer. Two models can be compared
    item by item if their `items_sha256` are equal.
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


def run_tasks(
    model: NeuralModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    settings: Settings,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run all tasks of params.yaml and return their report; the cloze has passages of `split`."""
    tasks = {"cloze": make_cloze(split, encoding, settings)}  # empty if no document repeats a word
    for name, source in (("lambada_word", settings.lambada), ("lambada_original", settings.lambada_original)):
        if source is not None:
            tasks[name] = read_lambada(fetch_source(source))
    report: dict[str, Any] = {}
    for done, (name, items) in enumerate(tasks.items(), 1):
        if items:
            scores = answer(model, items)
            nats = np.array([each[:, 0].sum() for each in scores])
            report[name] = answer_figures(items, nats, np.array([each[:, 1].all() for each in scores]))
            if name == "lambada_word":
                last = np.array([each[-1] for each in scores])  # (items, 3)
                report["lambada_last_token"] = answer_figures(items, last[:, 0], last[:, 2] > 0)
        progress(done, len(tasks))
    for name, source in settings.wikitext.items():
        lines = read_lines(fetch_source(source))
        scored = score_wikitext(model, lines, settings.wikitext_context, settings.wikitext_stride)
        report[name] = {"sha256": source.sha256, **scored}
    return report
