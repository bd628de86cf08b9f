"""Generate text with a neural model by greedy decoding, top-k sampling and nucleus sampling.

Shapes: B continuations, T tokens, C channels, V tokens of the vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig
from compactgpt.common.escaping import markdown_block, markdown_text
from compactgpt.config import Text
from compactgpt.data.token_files import TokenFile
from compactgpt.evaluation.likelihood import NeuralModel
from compactgpt.evaluation.text_metrics import SOURCES, statistics
from compactgpt.evaluation.totals import Floats

if TYPE_CHECKING:
    import tiktoken
    import torch

Sampler = Callable[[Floats], int]  # a function of logits, (V,), that returns the next token
STRATEGIES = ("greedy", "top_k", "nucleus")


# --- choosing the next token


def top_k_probabilities(logits: Floats, *, temperature: float, top_k: int) -> Floats:
    """Return the probabilities of top-k sampling (Fan et al. 2018), (V,).

    They are softmax(logits / temperature) over the `top_k` largest logits, and 0 elsewhere.
    """
    bound = np.partition(logits, -top_k)[-top_k] if top_k < len(logits) else -np.inf
    kept = np.flatnonzero(logits >= bound)  # more than top_k tokens if several logits equal `bound`
    kept = kept[np.argsort(-logits[kept], kind="stable")][:top_k]
    weights = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    probabilities = np.zeros_like(logits)
    probabilities[kept] = weights / weights.sum()
    return probabilities


def nucleus_probabilities(logits: Floats, *, top_p: float) -> Floats:
    """Return the probabilities of nucleus sampling (Holtzman et al. 2020), (V,).

    They are 0 outside of the nucleus: the fewest tokens whose probabilities sum to at least `top_p`.
    """
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    # First try the tokens of probability 1e-5 or more, because sorting the complete vocabulary is slow.
    for least in (1e-5, 0.0):
        likely = np.flatnonzero(weights >= least)
        likely = likely[np.argsort(-weights[likely], kind="stable")]
        cumulative = np.cumsum(weights[likely])
        if cumulative.size and cumulative[-1] >= top_p:
            break
    kept = likely[: int(np.searchsorted(cumulative, top_p)) + 1]
    probabilities: Floats = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def greedy(logits: Floats) -> int:
    """Return the token with the largest logit."""
    return int(logits.argmax())


def seeded_sampler(probabilities: Callable[[Floats], Floats], seed: int, key: str) -> Sampler:
    """Return a sampler of `probabilities(logits)`. The random numbers depend only on `seed` and `key`."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))

    def sample(logits: Floats) -> int:
        found = probabilities(logits)  # (V,)
        bounds = np.cumsum(found)
        token = int(np.searchsorted(bounds, generator.random() * bounds[-1], side="right"))  # inverse CDF
        # Rounding could select a token of probability 0 after the last possible token: `min` prevents this.
        return min(token, int(np.flatnonzero(found)[-1]))

    return sample


def make_sampler(strategy: str, text: Text, prompt: str) -> Sampler:
    """Return the function that selects each next token of one continuation."""
    if strategy == "greedy":
        return greedy
    probabilities = partial(nucleus_probabilities, top_p=text.top_p)
    if strategy == "top_k":
        probabilities = partial(top_k_probabilities, temperature=text.temperature, top_k=text.top_k)
    return seeded_sampler(probabilities, text.seed, f"{strategy} {prompt}")


# --- running the model


def generate_tokens(
    model: NeuralModel,
    prompts: Sequence[list[int]],
    samplers: Sequence[Sampler],
    max_new_tokens: int,
    end: int,
) -> Iterator[list[int | None]]:
    """At each step, yield a list with the next token of each text. All prompts run in one batch.

    After a text has generated the token `end`, the lists have None for this text.
    """
    import torch

    device = model.head.device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    step = None  # without a step function, the model reads each text again for every new token
    if model.decoder is not None and longest + max_new_tokens <= model.block_size:
        step = model.decoder(torch.tensor(padding, device=device))
    texts = [list(prompt) for prompt in prompts]
    unread = [[end] * missing + prompt for missing, prompt in zip(padding, prompts, strict=True)]  # (B, T)
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            last = step(torch.tensor(unread, device=device)) if step else _read_again(model, texts)
            logits: Floats = (last @ model.head.T).cpu().double().numpy()  # (B, C) @ (C, V)
        rows = zip(samplers, logits, ended, strict=True)
        tokens = [None if done else sampler(row) for sampler, row, done in rows]
        yield tokens
        ended = [token is None or token == end for token in tokens]
        if all(ended):
            break
        # A text that has ended gets the token `end` at every step, because all rows need the same length.
        unread = [[end if token is None else token] for token in tokens]
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)


def _read_again(model: NeuralModel, texts: list[list[int]]) -> "torch.Tensor":
    """Return the hidden state of each text's last token, (B, C), without a key-value cache."""
    import torch

    seen = [torch.tensor(text[-model.block_size :]) for text in texts]
    fed = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True)  # (B, T), padded on the right
    last = torch.tensor([len(text) - 1 for text in seen])
    return model.hidden(fed.to(model.head.device))[torch.arange(len(seen)), last]


# --- the report of generated text


def choose_prompts(
    text: Text, split: TokenFile, encoding: "tiktoken.Encoding"
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return all prompts, and the tokens of the human continuations.

    Only a prompt from a document has a human continuation: the document's next `text.max_new_tokens` tokens.
    Raises BadConfig if fewer than two documents are long enough.
    """
    needed = text.prompt_tokens + text.max_new_tokens
    long_enough = np.flatnonzero(np.diff(split.offsets) - 1 >= needed)
    if len(long_enough) < 2:
        raise BadConfig(
            f"{split.path} has {len(long_enough)} documents of at least {needed} tokens, but text statistics "
            "need 2: lower evaluation.text.prompt_tokens or max_new_tokens"
        )
    chosen = np.linspace(0, len(long_enough) - 1, min(text.documents, len(long_enough))).astype(int)
    samples: list[dict[str, Any]] = [{"prompt": prompt, "document": None} for prompt in text.prompts]
    human = []
    for document in long_enough[chosen].tolist():
        tokens = split.document(document)[:needed].tolist()
        beginning = encoding.decode_bytes(tokens[: text.prompt_tokens]).decode("utf-8", errors="ignore")
        samples.append({"prompt": beginning, "document": split.document_ids[document]})
        human.append(tokens[text.prompt_tokens :])
    return samples, human


def generate_texts(
    model: NeuralModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    text: Text,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Continue every prompt by every decoding strategy, and return the report.

    The report's statistics compare continuations with human text, both of at most `max_new_tokens` tokens.
    """
    samples, human = choose_prompts(text, split, encoding)
    jobs = [(sample, strategy) for sample in samples for strategy in STRATEGIES]
    progress(0, len(jobs))
    for start in range(0, len(jobs), text.batch_size):
        batch = jobs[start : start + text.batch_size]
        found = _continue(model, [(sample["prompt"], strategy) for sample, strategy in batch], text)
        for (sample, strategy), continuation in zip(batch, found, strict=True):
            sample[strategy] = continuation
        progress(start + len(batch), len(jobs))
    figures = {"human": statistics(human, None)}
    for strategy in STRATEGIES:
        texts = [sample[strategy] for sample in samples if sample["document"] is not None]
        tokens = [encoding.encode_ordinary(each["text"])[: text.max_new_tokens] for each in texts]
        figures[strategy] = statistics(tokens, [each["ended"] for each in texts])
    settings = text.model_dump(mode="json", exclude={"prompts"})
    return {"settings": settings, "samples": samples, "statistics": figures, "formulas": SOURCES}


def _continue(model: NeuralModel, jobs: Sequence[tuple[str, str]], text: Text) -> Iterator[dict[str, Any]]:
    """Yield the continuation of each pair (prompt, strategy) in `jobs`, all generated in one batch."""
    codec = model.codec
    assert codec is not None
    end = codec.first_token
    prompts = [[end, *codec.encode(prompt)] for prompt, _ in jobs]
    samplers = [make_sampler(strategy, text, prompt) for prompt, strategy in jobs]
    steps = generate_tokens(model, prompts, samplers, text.max_new_tokens, end)
    for row in zip(*steps, strict=True):
        tokens = [token for token in row if token not in (None, end)]
        yield {"text": codec.decode(tokens), "tokens": len(tokens), "ended": end in row}


def samples_markdown(report: Mapping[str, Any]) -> str:
    """Return a Markdown page with the continuations of the prompts of params.yaml."""
    settings = report["settings"]
    lines = [
        "# Samples",
        "",
        f"Each text has at most {settings['max_new_tokens']} new tokens. *top_k* draws from the "
        f"{settings['top_k']} most probable tokens at temperature {settings['temperature']}. *nucleus* uses "
        f"top-p {settings['top_p']}. The random seed is {settings['seed']}.",
    ]
    for sample in report["samples"]:
        if sample["document"] is None:
            lines += ["", f"## {markdown_text(sample['prompt'])}"]
            for strategy in STRATEGIES:
                found = sample[strategy]
                lines += ["", f"{strategy}, {found['tokens']} tokens:", "", markdown_block(found["text"])]
    return "\n".join(lines) + "\n"
