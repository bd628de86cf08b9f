"""A neural model + prompts -> text: greedy, or drawn with temperature and top-k from a stream of its own.

A prompt opens a document, as in evaluation: the end-of-text token stands before it. T tokens, C channels,
V rows of the vocabulary.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tiktoken
import torch

from compactgpt.config import Samples
from compactgpt.evaluation import Floats, Neural
from compactgpt.progress import Progress, silent


def next_logits(model: Neural, tokens: list[int]) -> Floats:
    """Logits of the token after `tokens`, of which the model sees its last `block_size`. (V,)"""
    fed = torch.tensor([tokens[-model.block_size :]], device=model.head.device)  # (1, T)
    with torch.inference_mode():
        last = model.hidden(fed)[0, -1]  # (C,)
        logits: Floats = (model.head @ last).cpu().double().numpy()
    return logits


def top_k_probabilities(logits: Floats, *, temperature: float, top_k: int) -> Floats:
    """Softmax of logits / temperature over the `top_k` largest, zero elsewhere (Fan et al. 2018). (V,)"""
    kept = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[kept] - logits.max()) / temperature)
    probabilities = np.zeros_like(logits)
    probabilities[kept] = weights / weights.sum()
    return probabilities


def generate(
    model: Neural, prompt: list[int], max_new_tokens: int, eot_token: int, choose: Callable[[Floats], int]
) -> list[int]:
    """Continue a prompt token by token until end-of-text or `max_new_tokens`.

    Returns:
        The new tokens, without the end-of-text that closed them.
    """
    tokens = [eot_token, *prompt]
    while len(tokens) < 1 + len(prompt) + max_new_tokens:
        token = choose(next_logits(model, tokens))
        if token == eot_token:
            break
        tokens.append(token)
    return tokens[1 + len(prompt) :]


def prompt_generator(seed: int, prompt: str) -> np.random.Generator:
    """The random stream of one prompt: another prompt in the list changes nothing for this one."""
    key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))


def sample_text(
    model: Neural, encoding: tiktoken.Encoding, samples: Samples, progress: Progress = silent
) -> dict[str, Any]:
    """Let the model continue every prompt, greedily and by sampling.

    Returns:
        `settings`, and `samples`: for each prompt `greedy` and `sampled`, with text and number of tokens.
    """
    written = []
    for done, prompt in enumerate(samples.prompts, 1):
        tokens = encoding.encode_ordinary(prompt)
        generator = prompt_generator(samples.seed, prompt)
        ways: dict[str, Callable[[Floats], int]]
        ways = {"greedy": _most_likely, "sampled": partial(_drawn, generator, samples)}
        continuations = {}
        for way, choose in ways.items():
            new = generate(model, tokens, samples.max_new_tokens, encoding.eot_token, choose)
            continuations[way] = {"text": encoding.decode(new), "tokens": len(new)}
        written.append({"prompt": prompt, **continuations})
        progress(done, len(samples.prompts))
    settings = samples.model_dump(mode="json", exclude={"prompts"})
    return {"settings": settings, "samples": written}


def _most_likely(logits: Floats) -> int:
    return int(logits.argmax())


def _drawn(generator: np.random.Generator, samples: Samples, logits: Floats) -> int:
    probabilities = top_k_probabilities(logits, temperature=samples.temperature, top_k=samples.top_k)
    return int(generator.choice(len(probabilities), p=probabilities))


def samples_markdown(report: Mapping[str, Any]) -> str:
    """Render `sample_text`'s report for readers."""
    settings = report["settings"]
    lines = [
        "# Samples",
        "",
        f"At most {settings['max_new_tokens']} tokens; *sampled* is temperature {settings['temperature']}, "
        f"top-k {settings['top_k']}, seed {settings['seed']}.",
    ]
    for sample in report["samples"]:
        lines += ["", f"## {sample['prompt']}"]
        for way in ("greedy", "sampled"):
            text = sample[way]["text"].replace("```", "` ` `")
            lines += ["", f"{way}, {sample[way]['tokens']} tokens:", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"
