"""Params, token files and the stage script of a training that takes a moment."""

from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import atomic_folder
from compactgpt.config import parse_params
from tests.support.tiny_corpus import write_token_file

ROOT = Path(__file__).parents[2]


VOCAB, EOT = 40, 39


def tree_of(model=(), **changes):
    """The project's params.yaml, made tiny."""
    tree = read_yaml(ROOT / "params.yaml")
    tree["runtime"].update(device="cpu", num_threads=1)
    tree["model"].update(block_size=8, n_layer=2, n_head=2, n_embd=16, vocab_size=VOCAB)
    tree["model"].update({"padded_vocab_size": 48, **dict(model)})
    tree["training"].update(max_steps=6, tokens_per_step=32, micro_batch_size=2, warmup_steps=2)
    tree["training"].update(eval_interval=2, eval_windows=5, checkpoint_interval=2)
    tree["training"].update(head="full", init_unigram=0.0, init_positions=0.0)
    tree["training"].update(changes)
    tree["evaluation"]["likelihood"]["window"] = 8
    return tree


def params_of(**changes):
    return parse_params(tree_of(**changes))


def make_tokens(folder, vocab=VOCAB):
    """Two small splits: every token is the one before it plus 1, 2 or 3."""
    generator = np.random.default_rng(0)
    with atomic_folder(folder) as temporary:
        for name, count in (("train", 30), ("val", 7)):
            documents = [
                (bytes([n] * 16), 100, np.cumsum(generator.integers(1, 4, 5 + 7 * (n % 5))) % EOT)
                for n in range(count)
            ]
            write_token_file(
                temporary / f"{name}.tokens",
                iter(documents),
                vocab_size=vocab,
                eot_token=EOT,
                tokenizer_sha256="0" * 64,
            )
    return folder


def same_bits(a, b):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    return a.rows == b.rows and all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


def door():
    from stages.training import app

    return CliRunner().invoke(app, ["--tracker", "none"])


def contents():
    return {path: path.read_bytes() for name in ("models", "reports") for path in Path(name).rglob("*.*")}
