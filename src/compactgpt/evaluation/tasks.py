"""Passages whose last word is to be guessed: LAMBADA in its variants, and a cloze of the val split.

LAMBADA (Paperno et al. 2016) is known by three numbers of one name, so each variant has its own:

- lambada_word: OpenAI's text, the whole last word, greedily: right where every one of its tokens is the
  most likely one. EleutherAI's lm-evaluation-harness calls this lambada_openai; equal to its tokens.
- lambada_last_token: OpenAI's text, the last token only, words that can't end a passage left out of the
  choice, as in the GPT-2 paper (Radford et al. 2019, section 3.3). The paper does not print its list of
  stop words; STOP_WORDS is NLTK's of 127.
- lambada_original: the authors' text, the whole last word.

The cloze has the first variant's form. Perplexity is exp of the mean nats of a whole target. Nothing
stands before a passage, as in the harness.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.config import Likelihood
from compactgpt.config import Tasks as Settings
from compactgpt.data.token_files import TokenFile, Window
from compactgpt.evaluation.likelihood import Codec, Floats, Neural, document_text, score_targets
from compactgpt.evaluation.metrics import perplexity, ratio_bootstrap, wilson
from compactgpt.evaluation.task_sources import fetch_source
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
# A word of four letters or more behind one space.
_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})(?![A-Za-z0-9_])")
_LEAST_CONTEXT = 0.5  # of cloze_characters


Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Item:
    """A passage and what ends it."""

    context: str
    target: str  # with the space before it


@dataclass(frozen=True)
class Answers:
    """What a model made of each item."""

    nats: Floats  # (items,) of the whole target
    hits: Flags  # (items,)


def read_lambada(path: Path) -> list[Item]:
    """Read passages, one JSON object with a key `text` a line; the target is what follows the last space.

    Raises:
        BadData: another form, or a passage of one word.
    """
    items = []
    try:
        for line in path.read_text("utf-8").splitlines():
            context, target = json.loads(line)["text"].rsplit(" ", 1)
            items.append(Item(context, " " + target))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"{path} is no LAMBADA file, a JSON object with `text` a line ({error})") from error
    return items


def make_cloze(split: TokenFile, encoding: "tiktoken.Encoding", settings: Settings) -> list[Item]:
    """Choose passages of a split: a pure function of its documents.

    A target is a word of four letters or more that its passage has shown before (as four of five of
    LAMBADA's have), so that context helps. Documents take turns, each offering its candidates in the order
    of a hash, so that no document outweighs the others and growth of one moves nothing in another.
    """
    offers = [
        iter(_candidates(document_text(split, encoding, document).decode(), name, settings.cloze_characters))
        for document, name in enumerate(split.document_ids)
    ]
    items: list[Item] = []
    while offers and len(items) < settings.cloze_items:
        left = []
        for offer in offers:
            if (item := next(offer, None)) is not None and len(items) < settings.cloze_items:
                items.append(item)
                left.append(offer)
        offers = left
    return items


def _candidates(text: str, document: str, characters: int) -> Iterator[Item]:
    """A document's possible passages, in the order of a hash of their places; targets differ."""

    def order(match: re.Match[str]) -> bytes:
        return hashlib.sha256(f"{document} {match.start()}".encode()).digest()

    asked = set()
    for match in sorted(_WORD.finditer(text), key=order):
        start = text.find(" ", max(0, match.start() - characters)) + 1  # passages open with a whole word
        context, word = text[start : match.start()], match[1]
        if len(context) < _LEAST_CONTEXT * characters or word in asked:
            continue
        if re.search(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])", context):
            asked.add(word)
            yield Item(context, match[0])


def item_window(codec: Codec, item: Item, place: int, block_size: int) -> Window:
    """Put an item into tokens as the harness does: its target is what the context's own tokens leave over."""
    whole = codec.encode(item.context + item.target)
    known = len(codec.encode(item.context))
    if not known:
        whole, known = [codec.first_token, *whole], 1
    stream = np.array(whole, np.int64)[-(block_size + 1) :]
    return Window(place, 0, stream[:-1], stream[1:][-(len(whole) - known) :])


def ask(model: Neural, items: Sequence[Item]) -> Answers:
    """Let a model, which must have a codec, end every passage."""
    return Answers(*score_windows(model, _item_windows(model, items)))


def ask_both_ways(model: Neural, items: Sequence[Item]) -> tuple[Answers, Answers]:
    """Let a model end every passage, once, and judge its whole words and its last tokens.

    Returns:
        What `ask` returns, and the answers of which the last token alone is scored, stop words left out of
        the choice, though not of the nats.
    """
    scores = _score(model, _item_windows(model, items), _stop_words(_codec(model), len(model.head)))
    last = np.array([each[-1] for each in scores]).reshape(-1, 3)
    return Answers(*_of_windows(scores)), Answers(last[:, 0], last[:, 2].astype(bool))


def _item_windows(model: Neural, items: Sequence[Item]) -> list[Window]:
    codec = _codec(model)
    return [item_window(codec, item, place, model.block_size) for place, item in enumerate(items)]


def score_windows(model: Neural, windows: Sequence[Window]) -> tuple[Floats, Flags]:
    """Score windows, each numbered by its `document`, in any order.

    Returns:
        Nats of each window's targets, and whether each of them was the most likely token.
    """
    return _of_windows(_score(model, windows, np.zeros(len(model.head), bool)))


def _of_windows(scores: Sequence[Floats]) -> tuple[Floats, Flags]:
    nats = np.array([each[:, 0].sum() for each in scores], np.float64)
    return nats, np.array([each[:, 1].all() for each in scores], bool)


def _score(model: Neural, windows: Sequence[Window], banned: Flags) -> list[Floats]:
    """Nats of each target, whether it is the likeliest token, and whether of those not banned. (T, 3) each.

    Args:
        model: any.
        windows: each numbered by its `document`.
        banned: tokens. (V,)
    """
    import torch
    from torch.nn.functional import cross_entropy

    mask = torch.from_numpy(banned).to(model.head.device)

    def score(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        nats = cross_entropy(logits, targets, reduction="none")  # (N,)
        free = logits.argmax(1) == targets
        chosen = logits.masked_fill_(mask, -torch.inf).argmax(1) == targets if banned.any() else free
        return torch.stack([nats, free.float(), chosen.float()], 1)  # (N, 3)

    scores = [np.zeros((0, 3))] * len(windows)
    for window, values in score_targets(model, windows, score):
        scores[window.document] = values
    return scores


def _codec(model: Neural) -> Codec:
    if model.codec is None:
        raise BadConfig(f"{model.facts.get('kind')} has no tokenizer here, so it can't be asked")
    return model.codec


def _stop_words(codec: Codec, rows: int) -> Flags:
    """Tokens that spell a stop word. (V,)"""
    return np.array([codec.decode([token]).strip().lower() in STOP_WORDS for token in range(rows)])


def answer_figures(items: Sequence[Item], answers: Answers, likelihood: Likelihood) -> dict[str, Any]:
    """Make a task's part of the report: accuracy (Wilson), perplexity (bootstrap over items), each answer.

    `hits` has a 1 for each item that was right, so that two models can be compared item by item;
    `items_sha256` tells whether the items are the same.
    """
    text = json.dumps([[item.context, item.target] for item in items], ensure_ascii=False)
    loss = ratio_bootstrap(
        answers.nats,
        np.ones(len(items)),
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )
    return {
        "items": len(items),
        "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "accuracy": asdict(wilson(int(answers.hits.sum()), len(items))),
        "perplexity": asdict(loss.map(perplexity)),
        "hits": "".join("1" if hit else "0" for hit in answers.hits),
    }


def run_tasks(
    model: Neural,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    settings: Settings,
    likelihood: Likelihood,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask a model everything that params.yaml names.

    Args:
        model: with a codec.
        split: whose documents the cloze is made of.
        encoding: that made the split.
        settings: what to ask.
        likelihood: resamples and seed of the intervals.
        progress: told what is done.
    """
    asked = {"cloze": make_cloze(split, encoding, settings)}
    for name, source in (("lambada_word", settings.lambada), ("lambada_original", settings.lambada_original)):
        if source is not None:
            asked[name] = read_lambada(fetch_source(source))
    report: dict[str, Any] = {}
    for done, (name, items) in enumerate(asked.items(), 1):
        if name == "lambada_word":
            word, last = ask_both_ways(model, items)
            report[name] = answer_figures(items, word, likelihood)
            report["lambada_last_token"] = answer_figures(items, last, likelihood)
        elif items:
            report[name] = answer_figures(items, ask(model, items), likelihood)
        progress(done, len(asked))
    for name, source in settings.wikitext.items():
        lines = read_lines(fetch_source(source))
        scored = score_wikitext(model, lines, settings.wikitext_context, settings.wikitext_stride)
        report[name] = {"sha256": source.sha256, **scored}
    return report
