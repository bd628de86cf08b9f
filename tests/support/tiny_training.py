"""A GPT, parameters, token files and a stage script of training that take a moment."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import atomic_folder
from compactgpt.config import Model, Training, parse_params
from tests.support.tiny_corpus import write_token_file

ROOT = Path(__file__).parents[2]
VOCAB, EOT = 40, 39
RECIPE = {
    "seed": 1, "max_steps": 100, "tokens_per_step": 16, "micro_batch_size": 2, "optimizer": "adamw",
    "learning_rate": 1e-2, "embedding_learning_rate": 2e-2, "muon_learning_rate": 5e-2, "min_lr_ratio": 0.1,
    "schedule": "cosine", "warmup_steps": 10, "decay_share": 0.2, "weight_decay": 0.1, "beta1": 0.9,
    "beta2": 0.95, "grad_clip": 1.0, "eval_interval": 10, "eval_windows": 4, "checkpoint_interval": 10,
}  # fmt: skip


def tiny_shape(**changes):
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50}
    return Model(**{**shape, "padded_vocab_size": 64, "bias": False, "dropout": 0.0, **changes})


def recipe(**changes):
    return Training(**{**RECIPE, **changes})


def random_batch(sequences, length, seed=3):
    """Tokens and targets. 2 x (sequences, length)."""
    drawn = np.random.default_rng(seed).integers(0, 50, (sequences, length + 1))
    return torch.from_numpy(drawn[:, :-1]), torch.from_numpy(drawn[:, 1:])


def params_tree(model=(), **changes):
    """The project's params.yaml with a tiny training."""
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
    return parse_params(params_tree(**changes))


def write_params(folder=Path(), **changes):
    """Write a params.yaml with a tiny training."""
    (folder / "params.yaml").write_text(json.dumps(params_tree(**changes)))  # JSON is YAML


def make_tokens(folder, vocab=VOCAB):
    """Write two small splits in which every token is the one before it plus 1, 2 or 3."""
    generator = np.random.default_rng(0)
    about = {"vocab_size": vocab, "eot_token": EOT, "tokenizer_sha256": "0" * 64}
    with atomic_folder(folder) as temporary:
        for name, count in (("train", 30), ("val", 7)):
            documents = [
                (bytes([n] * 16), 100, np.cumsum(generator.integers(1, 4, 5 + 7 * (n % 5))) % EOT)
                for n in range(count)
            ]
            write_token_file(temporary / f"{name}.tokens", iter(documents), **about)
    return folder


def assert_same_bits(a, b):
    """Compare the curves and weights of two trainings."""
    assert a.rows == b.rows
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=0, atol=0)


def stop_after(step):
    """Return a `should_stop` that `train` calls after each step, and that is true after one of them."""
    calls = itertools.count(1)
    return lambda: next(calls) == step


def run_stage():
    """Run the training stage in the current folder."""
    from stages.training import app

    return CliRunner().invoke(app, ["--tracker", "none"])


def outputs():
    """The files of models/ and reports/ in the current folder."""
    return {path: path.read_bytes() for name in ("models", "reports") for path in Path(name).rglob("*.*")}
