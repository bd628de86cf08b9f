"""A tokenizer, a split and models small enough for hand work, shared by the tests of the measuring rooms."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from ruamel.yaml import YAML

from compactgpt.config import Likelihood, Model
from compactgpt.data import TokenFile, open_tokens, write_tokens
from compactgpt.encoding import load_encoding, save_gpt2, spelled_bytes
from compactgpt.model import GPT

ROOT = Path(__file__).parents[1]
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "e r"]
TEXTS = [
    "the cat sat in the hat",
    "é 漢字 🙂 in the other weather",
    "a",
    "Return the <|endoftext|> inner thing in there, rather than the other one.  Then the end.\n",
    "then",
]
LIKELIHOOD = Likelihood(
    window=8, batch_size=3, own_context=16, stride_share=0.25, bootstrap_resamples=50, bootstrap_seed=1
)


def vocabulary() -> dict[str, int]:
    """GPT-2's way: 256 bytes, then merges in order, then end-of-text."""
    words = [*spelled_bytes(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    return {word: rank for rank, word in enumerate(words)}


def save_tokenizer(folder: Path):
    """Save the tiny encoding as `download` does, and load it."""
    save_gpt2(folder, "\n".join(["#version: 0.2", *MERGES, ""]).encode(), json.dumps(vocabulary()).encode())
    return load_encoding(folder)


def save_split(path: Path, encoding, texts=TEXTS) -> TokenFile:
    """Write a split and open it."""
    documents = (
        (
            hashlib.sha256(text.encode()).digest()[:16],
            len(text.encode()),
            np.array(encoding.encode_ordinary(text), np.int64),
        )
        for text in texts
    )
    write_tokens(
        path,
        documents,
        vocab_size=encoding.n_vocab,
        eot_token=encoding.eot_token,
        tokenizer_sha256="0" * 64,
    )
    return open_tokens(path)


def tiny_gpt(vocab_size: int, **changes) -> GPT:
    """A GPT with weights large enough that every part of it matters."""
    shape = {
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size + 9,
        "bias": True,
        "dropout": 0.5,  # a model in training mode would show
    }
    model = GPT(Model(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_params(path: Path, change) -> None:
    """Write the project's params.yaml with `change` made to its tree."""
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["evaluation"]["likelihood"] = LIKELIHOOD.model_dump()
    tree["evaluation"]["text"] |= {"documents": 2, "prompt_tokens": 4, "max_new_tokens": 5, "batch_size": 7}
    tree["evaluation"]["tasks"] |= {"cloze_items": 3, "cloze_characters": 30}
    change(tree)
    path.write_text(json.dumps(tree))  # JSON is YAML
