"""A neural model + prompts -> text: greedy, top-k, nucleus, each continuation from a stream of its own.

Prompts are params.yaml's own and the beginnings of val documents. A prompt opens a document, as in
evaluation: the end-of-text token stands before it. What is said of the text is `compactgpt.text`'s; the
documents themselves go on as the human text beside the models.

B continuations, T tokens, C channels, V rows of the vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig
from compactgpt.common.escaping import markdown_block, markdown_text
from compactgpt.config import Text
from compactgpt.data.token_files import TokenFile
from compactgpt.evaluation.likelihood import Floats, Neural, Step
from compactgpt.evaluation.text_metrics import SOURCES, statistics

if TYPE_CHECKING:
    import tiktoken
    import torch

Choose = Callable[[Floats], int]  # logits (V,) -> token
WAYS = ("greedy", "top_k", "nucleus")
_NUCLEUS_SIFT = 1e-5  # less likely tokens are looked at only where the others do not fill the nucleus


def top_k_probabilities(logits: Floats, *, temperature: float, top_k: int) -> Floats:
    """Softmax of logits / temperature over the `top_k` largest, zero elsewhere (Fan et al. 2018). (V,)"""
    bound = np.partition(logits, -top_k)[-top_k] if top_k < len(logits) else -np.inf
    kept = np.flatnonzero(logits >= bound)  # more than top_k only where logits tie
    kept = kept[np.argsort(-logits[kept], kind="stable")][:top_k]
    weights = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    probabilities = np.zeros_like(logits)
    probabilities[kept] = weights / weights.sum()
    return probabilities


def nucleus_probabilities(logits: Floats, *, top_p: float) -> Floats:
    """Softmax over the fewest most likely tokens that hold `top_p` of it (Holtzman et al. 2020). (V,)"""
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    for least in (_NUCLEUS_SIFT, 0.0):
        likely = np.flatnonzero(weights >= least)
        likely = likely[np.argsort(-weights[likely], kind="stable")]
        reached = np.cumsum(weights[likely])
        if reached.size and reached[-1] >= top_p:
            break
    kept = likely[: int(np.searchsorted(reached, top_p)) + 1]
    probabilities: Floats = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def draw(generator: np.random.Generator, probabilities: Floats) -> int:
    """Draw a token with one uniform number."""
    bounds = np.cumsum(probabilities)
    place = int(np.searchsorted(bounds, generator.random() * bounds[-1], side="right"))
    return min(place, int(np.flatnonzero(probabilities)[-1]))


def chooser(way: str, text: Text, prompt: str) -> Choose:
    """How one continuation chooses its tokens."""
    if way == "greedy":
        return lambda logits: int(logits.argmax())
    generator = prompt_generator(text.seed, f"{way} {prompt}")
    if way == "top_k":
        probabilities = partial(top_k_probabilities, temperature=text.temperature, top_k=text.top_k)
    else:
        probabilities = partial(nucleus_probabilities, top_p=text.top_p)
    return lambda logits: draw(generator, probabilities(logits))


def prompt_generator(seed: int, prompt: str) -> np.random.Generator:
    """The random stream of one prompt: another prompt in the list changes nothing for this one."""
    key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))


@dataclass(frozen=True)
class Continuation:
    """What was written behind a prompt."""

    tokens: list[int]  # the model's own, without the end-of-text that closed them
    ended: bool  # by end-of-text, not by the limit


def write_on(
    model: Neural, prompts: Sequence[list[int]], choose: Sequence[Choose], max_new_tokens: int, end: int
) -> list[Continuation]:
    """Continue all prompts at once, token by token, until `end` or `max_new_tokens`.

    Keys and values of what was read are kept where the model can (its `decoder`) and all fits its context;
    else everything is read anew for each token, of which the model sees its last `block_size`.
    """
    import torch

    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cached = model.decoder is not None and longest + max_new_tokens <= model.block_size
    opened = model.decoder if cached and model.decoder else partial(_Reread, model)
    step: Step = opened(torch.tensor(padding, device=model.head.device))
    fed = [[end] * missing + prompt for missing, prompt in zip(padding, prompts, strict=True)]
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    while len(max(new, key=len)) < max_new_tokens and not all(ended):
        with torch.inference_mode():
            last = step(torch.tensor(fed, device=model.head.device))  # (B, C)
            logits: Floats = (last @ model.head.T).cpu().double().numpy()  # (B, V)
        fed = [[end] for _ in prompts]
        for row in (row for row, done in enumerate(ended) if not done):
            token = choose[row](logits[row])
            ended[row] = token == end
            if not ended[row]:
                new[row].append(token)
                fed[row] = [token]
    return [Continuation(*pair) for pair in zip(new, ended, strict=True)]


class _Reread:
    """A `Step` without a cache: reads all rows from their beginning, left-aligned, at each call."""

    def __init__(self, model: Neural, padding: "torch.Tensor") -> None:
        self._model = model
        self._padding = padding.tolist()
        self._rows: list[list[int]] = [[] for _ in self._padding]

    def __call__(self, tokens: "torch.Tensor") -> "torch.Tensor":
        import torch

        for row, more, missing in zip(self._rows, tokens.tolist(), self._padding, strict=True):
            row.extend(more if row else more[missing:])
        seen = [row[-self._model.block_size :] for row in self._rows]
        longest = max(map(len, seen))
        fed = torch.tensor([row + [0] * (longest - len(row)) for row in seen], device=tokens.device)
        last = torch.tensor([len(row) - 1 for row in seen], device=tokens.device)
        return self._model.hidden(fed)[torch.arange(len(seen), device=tokens.device), last]


@dataclass(frozen=True)
class Prompt:
    """What is continued; a document's beginning has how it goes on."""

    text: str
    document: str | None = None  # its id
    human: tuple[int, ...] = ()  # the split's tokens that follow


def choose_prompts(text: Text, split: TokenFile, encoding: "tiktoken.Encoding") -> list[Prompt]:
    """The prompts of params.yaml, then the beginnings of documents that lie evenly in the split.

    Only documents that are long enough for the prompt and as much human text as a model may write.

    Raises:
        BadConfig: fewer than two documents are.
    """
    needed = text.prompt_tokens + text.max_new_tokens
    long_enough = np.flatnonzero(np.diff(split.offsets) - 1 >= needed)
    if len(long_enough) < 2:
        raise BadConfig(
            f"{split.path} has {len(long_enough)} documents of {needed} tokens, text statistics need 2: "
            "lower evaluation.text.prompt_tokens or max_new_tokens"
        )
    places = np.linspace(0, len(long_enough) - 1, min(text.documents, len(long_enough))).astype(int)
    prompts = [Prompt(prompt) for prompt in text.prompts]
    for document in long_enough[places].tolist():
        tokens = split.document(document)[:needed].tolist()
        beginning = encoding.decode_bytes(tokens[: text.prompt_tokens]).decode("utf-8", errors="ignore")
        human = tuple(tokens[text.prompt_tokens :])
        prompts.append(Prompt(beginning, split.document_ids[document], human))
    return prompts


def write_on_all(
    model: Neural,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    text: Text,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Let a model continue every prompt in every way.

    Returns:
        `settings`; `samples`, for each prompt and way the text with its number of own tokens; `statistics`
        of the continuations of documents, by way, and of `human` text of the same length.

    Raises:
        BadConfig: the model has no tokenizer here, or the split has no documents to continue.
    """
    prompts = choose_prompts(text, split, encoding)
    jobs = [(prompt, way) for prompt in prompts for way in WAYS]
    written = list(_write_jobs(model, jobs, text, progress))
    samples: list[dict[str, Any]]
    samples = [{"prompt": prompt.text, "document": prompt.document} for prompt in prompts]
    for place, ((_, way), (found, ended, tokens)) in enumerate(zip(jobs, written, strict=True)):
        samples[place // len(WAYS)][way] = {"text": found, "tokens": tokens, "ended": ended}
    figures = {}
    for way in WAYS:
        of_documents = [sample[way] for sample in samples if sample["document"] is not None]
        texts = [encoding.encode_ordinary(one["text"])[: text.max_new_tokens] for one in of_documents]
        figures[way] = statistics(texts, [one["ended"] for one in of_documents])
    figures["human"] = statistics([prompt.human for prompt in prompts if prompt.document], None)
    settings = text.model_dump(mode="json", exclude={"prompts"})
    return {"settings": settings, "samples": samples, "statistics": figures, "formulas": SOURCES}


def _write_jobs(
    model: Neural, jobs: Sequence[tuple[Prompt, str]], text: Text, progress: Progress
) -> Iterator[tuple[str, bool, int]]:
    """Write `batch_size` continuations at a time: text, whether it ended, own tokens."""
    codec = model.codec
    if codec is None:
        raise BadConfig(f"{model.facts.get('kind')} has no tokenizer here, so it can't write")
    for start in range(0, len(jobs), text.batch_size):
        batch = jobs[start : start + text.batch_size]
        prompts = [[codec.first_token, *codec.encode(prompt.text)] for prompt, _ in batch]
        choose = [chooser(way, text, prompt.text) for prompt, way in batch]
        for found in write_on(model, prompts, choose, text.max_new_tokens, codec.first_token):
            yield codec.decode(found.tokens), found.ended, len(found.tokens)
        progress(start + len(batch), len(jobs))


def samples_markdown(report: Mapping[str, Any]) -> str:
    """Render `write_on_all`'s report for readers."""
    settings = report["settings"]
    lines = [
        "# Samples",
        "",
        f"At most {settings['max_new_tokens']} tokens. *top_k* is top-k {settings['top_k']} at temperature "
        f"{settings['temperature']}, *nucleus* is top-p {settings['top_p']}, seed {settings['seed']}.",
    ]
    for sample in report["samples"]:
        if sample["document"] is not None:
            continue
        lines += ["", f"## {markdown_text(sample['prompt'])}"]
        for way in WAYS:
            lines += ["", f"{way}, {sample[way]['tokens']} tokens:", "", markdown_block(sample[way]["text"])]
    return "\n".join(lines) + "\n"
