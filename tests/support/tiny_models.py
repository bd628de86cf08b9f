"""A tiny tokenizer, split and models for tests of the evaluation."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from compactgpt.common.sections import read_yaml
from compactgpt.config import Likelihood, Model, load_params
from compactgpt.data.token_files import TokenFile, open_tokens
from compactgpt.data.tokenizer import load_encoding, save_gpt2, unicode_to_bytes
from compactgpt.model.gpt import GPT
from tests.support.tiny_corpus import write_token_file

ROOT = Path(__file__).parents[2]
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "e r"]
TEXTS = [
    "the cat sat in the hat",
    "é 漢字 🙂 in the other weather",
    "a",
    "Return the <|endoftext|> inner thing in there, rather than the other one.  Then the end.\n",
    "then",
]
LIKELIHOOD = Likelihood(window=8, batch_size=3, own_context=16, stride_share=0.25, views=("own",))


def vocabulary() -> dict[str, int]:
    """GPT-2's way: 256 bytes, then merges in order, then end-of-text."""
    words = [*unicode_to_bytes(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    return {word: rank for rank, word in enumerate(words)}


def save_tokenizer(folder: Path):
    """Save the tiny encoding as `download` does, and load it."""
    save_gpt2(folder, "\n".join(["#version: 0.2", *MERGES, ""]).encode(), json.dumps(vocabulary()).encode())
    return load_encoding(folder)


def save_split(path: Path, encoding, texts=TEXTS) -> TokenFile:
    """Write a split and open it."""
    documents = []
    for text in texts:
        content, tokens = text.encode(), np.array(encoding.encode_ordinary(text), np.int64)
        documents.append((hashlib.sha256(content).digest()[:16], len(content), tokens))
    about = {"vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token, "tokenizer_sha256": "0" * 64}
    write_token_file(path, documents, **about)
    return open_tokens(path)


def tiny_gpt(vocab_size: int, **changes) -> GPT:
    """A GPT with weights large enough that every part of it matters."""
    shape = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True}
    shape |= {"vocab_size": vocab_size, "padded_vocab_size": vocab_size + 9}
    shape |= {"dropout": 0.5}  # a model in training mode would show
    model = GPT(Model(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_random_gpt2(folder: Path, **changes):
    """Save a GPT-2 of transformers with large random weights, and return it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**{**shape, "bos_token_id": 39, "eos_token_id": 39, **changes})
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def save_params(path: Path, change) -> None:
    """Write the project's params.yaml with `change` made to its tree."""
    tree = read_yaml(ROOT / "params.yaml")
    tree["evaluation"]["likelihood"] = LIKELIHOOD.model_dump()
    tree["evaluation"]["text"] |= {"documents": 2, "prompt_tokens": 4, "max_new_tokens": 5, "batch_size": 7}
    tree["evaluation"]["tasks"] |= {"cloze_items": 3, "cloze_characters": 30}
    change(tree)
    path.write_text(json.dumps(tree))  # JSON is YAML


def params_of(path: Path, spec):
    """Return the project's configuration with one baseline, `it`."""
    save_params(path, lambda tree: tree["baseline"].update(names=["it"], specs={"it": spec}))
    return load_params(path)


def save_gguf(path, pre="smollm", architecture="llama"):
    """A random Llama in llama.cpp's form, 32 wide so that Q8_0 fits, with the tiny vocabulary."""
    import gguf

    generator = np.random.default_rng(4)
    writer = gguf.GGUFWriter(path, architecture)
    facts = {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "head_count": 4, "head_count_kv": 2, "rope_freq_base": 10000.0, "rope_dimension_count": 8,
        "layer_norm_rms_eps": 1e-5, "tokenizer_model": "gpt2", "tokenizer_pre": pre,
        "token_list": list(vocabulary()), "token_types": [1] * len(vocabulary()), "token_merges": MERGES,
        "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0,
    }  # fmt: skip
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    named |= {"token_embd": (len(vocabulary()), 32), "output_norm": (32,)}
    for name, shape in named.items():
        weight = generator.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + weight)
        else:
            quantized = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
