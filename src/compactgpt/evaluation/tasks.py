"""Ask a neural model for the last word of a passage: LAMBADA in its variants, and a cloze of the val split.

LAMBADA (Paperno et al. 2016) is known by three numbers of one name, so each variant has its own name:

- lambada_word: OpenAI's text, the whole last word, greedily: right if each of its tokens is the most likely
  one. This is lambada_openai of EleutherAI's lm-evaluation-harness, with equal tokens.
- lambada_last_token: OpenAI's text, the last token only; words that can't end a passage are excluded, as in
  the GPT-2 paper (Radford et al. 2019, section 3.3). The paper does not print its list of stop words;
  STOP_WORDS is NLTK's of 127.
- lambada_original: the authors' text, the whole last word.

The cloze has the form of the first variant. Perplexity is exp of the mean nats of a whole target. No token
precedes a passage, as in the harness.
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
from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.config import Likelihood, Source
from compactgpt.config import Tasks as Settings
from compactgpt.data.hub import fetch_file
from compactgpt.data.token_files import TokenFile, Window
from compactgpt.evaluation.likelihood import Codec, Floats, NeuralModel, document_text, score_targets
from compactgpt.evaluation.metrics import perplexity, ratio_bootstrap, wilson
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
# A word of four letters or more after one space.
_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})(?![A-Za-z0-9_])")

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Item:
    """A passage and what ends it."""

    context: str
    target: str  # with the space before it


@dataclass(frozen=True)
class Answers:
    """A model's score on each item."""

    nats: Floats  # (items,) of the whole target
    hits: Flags  # (items,)


def fetch_source(source: Source) -> Path:
    """Return the file of a source: a local one, or one in the hub's standard cache, downloaded if missing.

    Raises:
        MissingInput, Unreachable, BadConfig: it is not there, or the hub does not give it.
        BadData: its SHA-256 is another.
    """
    if source.path is None:
        advice = "give a local path in evaluation.tasks"
        path = fetch_file(str(source.repo), str(source.file), str(source.revision), advice)
    else:
        path = Path(source.path)
        if not path.is_file():
            raise MissingInput(f"{path} is missing: correct its path in evaluation.tasks, or set it to null")
    found = sha256_file(path)
    if found != source.sha256:
        raise BadData(
            f"{path} has SHA-256 {found}, evaluation.tasks expects {source.sha256}: correct the file or hash"
        )
    return path


def read_lambada(path: Path) -> list[Item]:
    """Read passages, a JSON object with the key `text` on each line; the target follows the last space.

    Raises:
        BadData: another form, or a passage of one word.
    """
    items = []
    try:
        for line in path.read_text("utf-8").splitlines():
            context, target = json.loads(line)["text"].rsplit(" ", 1)
            items.append(Item(context, " " + target))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"{path} is not a LAMBADA file, a JSON object with `text` a line ({error})") from error
    return items


def make_cloze(split: TokenFile, encoding: "tiktoken.Encoding", settings: Settings) -> list[Item]:
    """Choose passages of a split: a pure function of its documents.

    A target is a word of four letters or more that its passage contains before (as four of five targets of
    LAMBADA are), so that context helps. Documents take turns, each offering its candidates in the order of a
    hash, so that no document outweighs the others and growth of one changes nothing in another.
    """
    candidates = [
        _candidates(document_text(split, encoding, index).decode(), name, settings.cloze_characters)
        for index, name in enumerate(split.document_ids)
    ]
    items: list[Item] = []
    # One item of each document a turn, until there are enough or no document has any left.
    while candidates and len(items) < settings.cloze_items:
        turn = [(document, next(document, None)) for document in candidates]
        items += [item for _, item in turn if item is not None]
        candidates = [document for document, item in turn if item is not None]
    return items[: settings.cloze_items]


def _candidates(text: str, document: str, characters: int) -> Iterator[Item]:
    """Yield a document's possible passages, in the order of a hash of their positions; targets differ."""

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
    """Encode an item as lm-evaluation-harness does: the context's own tokens, and the rest as targets."""
    tokens = codec.encode(item.context + item.target)
    context = len(codec.encode(item.context))
    if not context:
        tokens, context = [codec.first_token, *tokens], 1
    targets = len(tokens) - context
    stream = np.array(tokens, np.int64)[-(block_size + 1) :]  # a longer context loses its beginning
    return Window(index, 0, stream[:-1], stream[1:][-targets:])


def answer(model: NeuralModel, items: Sequence[Item]) -> tuple[Answers, Answers]:
    """Let a model end every passage.

    Returns:
        The answers for the whole target; and for its last token alone, with stop words excluded from the
        model's choice, though not from the nats.
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
    by_item = [scores[index] for index in range(len(items))]  # (T, 3) each
    nats = np.array([each[:, 0].sum() for each in by_item])
    hits = np.array([each[:, 1].all() for each in by_item], bool)
    last = np.array([each[-1] for each in by_item]).reshape(-1, 3)
    return Answers(nats, hits), Answers(last[:, 0], last[:, 2].astype(bool))


def answer_figures(items: Sequence[Item], answers: Answers, likelihood: Likelihood) -> dict[str, Any]:
    """Return a task's part of the report: accuracy (Wilson), perplexity (bootstrap over items), each answer.

    `hits` has a 1 for each item that was right, so that two models can be compared item by item, if their
    `items_sha256` are equal.
    """
    text = json.dumps([[item.context, item.target] for item in items], ensure_ascii=False)
    resamples, seed = likelihood.bootstrap_resamples, likelihood.bootstrap_seed
    loss = ratio_bootstrap(answers.nats, np.ones(len(items)), resamples=resamples, seed=seed)
    return {
        "items": len(items),
        "items_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "accuracy": asdict(wilson(int(answers.hits.sum()), len(items))),
        "perplexity": asdict(loss.map(perplexity)),
        "hits": "".join("1" if hit else "0" for hit in answers.hits),
    }


def run_tasks(
    model: NeuralModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    settings: Settings,
    likelihood: Likelihood,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run all tasks that params.yaml names; the cloze is made from the documents of `split`."""
    tasks = {"cloze": make_cloze(split, encoding, settings)}  # empty where no word of a text comes twice
    for name, source in (("lambada_word", settings.lambada), ("lambada_original", settings.lambada_original)):
        if source is not None:
            tasks[name] = read_lambada(fetch_source(source))
    report: dict[str, Any] = {}
    for done, (name, items) in enumerate(tasks.items(), 1):
        if items:
            whole, last_token = answer(model, items)
            report[name] = answer_figures(items, whole, likelihood)
            if name == "lambada_word":
                report["lambada_last_token"] = answer_figures(items, last_token, likelihood)
        progress(done, len(tasks))
    for name, source in settings.wikitext.items():
        lines = read_lines(fetch_source(source))
        scored = score_wikitext(model, lines, settings.wikitext_context, settings.wikitext_stride)
        report[name] = {"sha256": source.sha256, **scored}
    return report
