"""Trainings in several processes, and what they leave."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import Busy, PeerLost
from compactgpt.training import trainer
from tests.support.processes import together
from tests.support.tiny_training import params_of

STEP = 64  # tokens: eight sequences, four micro-batches of two


def parameters(mode="fast", **changes):
    """Of a run in a mode; the head is the full one, since mode fsdp refuses the sampled one."""
    head = {"head": "full", "init_unigram": 0.0, "init_positions": 0.0}
    return params_of(**{"tokens_per_step": STEP, "launcher": {"mode": mode}, **head, **changes})


def train(tokens, folder, params, stop_at=0, kill=()):
    """Train in this process; the one that leads leaves weights.safetensors and rows.json."""
    rank = int(os.environ.get("RANK", "0"))
    steps = []

    def note(step, _values):
        steps.append(step)
        if (rank, step) == tuple(kill):
            os.kill(os.getpid(), signal.SIGKILL)

    trained = trainer.train(
        params,
        trainer.open_splits(tokens),
        folder / "state",
        on_metrics=note,
        stopping=lambda: rank == 1 and steps[-1] == stop_at,  # one is asked, all stop
    )
    if rank == 0:
        save_file(trained.model.state_dict(), folder / "weights.safetensors")
        rows = [[row.step, row.train_loss, row.val_loss] for row in trained.rows]
        (folder / "rows.json").write_text(json.dumps([trained.resumed_from, rows]))


def stopped(*args):
    with pytest.raises(Busy, match=r"stopped at step 3 of 6"):
        train(*args)


def bereft(*args):
    with pytest.raises(PeerLost, match="died or fell silent"):
        train(*args)


def outcome(folder):
    resumed_from, rows = json.loads((folder / "rows.json").read_text())
    return load_file(folder / "weights.safetensors"), rows, resumed_from


def assert_same_bits(a, b):
    (weights, rows, _), (others, other_rows, _) = a, b
    assert rows == other_rows
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def run(folder, size, tokens, params, **changes):
    folder.mkdir(exist_ok=True)
    assert together(size, train, tokens, folder, params, *changes.values()) == [0] * size
    return outcome(folder)
