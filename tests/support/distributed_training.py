"""Trainings in several processes, and what they leave."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import Busy, PeerLost
from compactgpt.training import trainer
from tests.support.processes import run_ranks
from tests.support.tiny_training import params_of


def parameters(mode="fast", **changes):
    """A run of eight sequences a step; the head is full, since mode fsdp refuses the sampled one."""
    return params_of(**{"tokens_per_step": 64, "launcher": {"mode": mode}, **changes})


def train(tokens, folder, params, stop_at=0, kill_at=None):
    """Train in this process; the main process leaves weights.safetensors and rows.json."""
    rank = int(os.environ.get("RANK", "0"))
    steps = []

    def note(losses):
        steps.append(losses[-1][0])
        if (rank, steps[-1]) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trained = trainer.train(
        params,
        trainer.open_splits(tokens),
        folder / "state",
        trainer.Callbacks(
            on_losses=note,
            should_stop=lambda: rank == 1 and steps[-1] == stop_at,  # one process is asked, all stop
        ),
    )
    if rank == 0:
        save_file(trained.model.state_dict(), folder / "weights.safetensors")
        (folder / "rows.json").write_text(json.dumps([trained.resumed_from, trained.rows]))


def train_and_stop(tokens, folder, params):
    """Process 1 is asked to stop after step 3."""
    with pytest.raises(Busy, match=r"stopped at step 3 of 6"):
        train(tokens, folder, params, stop_at=3)


def train_and_lose_rank_1(tokens, folder, params):
    """Process 1 is killed after step 5, for which there is no state."""
    if os.environ["RANK"] == "1":
        train(tokens, folder, params, kill_at=(1, 5))
    with pytest.raises(PeerLost, match="ended or did not answer"):
        train(tokens, folder, params)


def run(folder, size, tokens, params):
    """Train in `size` processes. Returns weights, loss curve and the step that the run resumed from."""
    folder.mkdir(exist_ok=True)
    assert run_ranks(size, train, tokens, folder, params) == [0] * size
    resumed_from, rows = json.loads((folder / "rows.json").read_text())
    return load_file(folder / "weights.safetensors"), rows, resumed_from


def assert_same_bits(a, b):
    (weights, rows, _), (others, other_rows, _) = a, b
    assert rows == other_rows
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def assert_same_curve(a, b, tolerance=2e-5):
    for (step, *losses), (other_step, *others) in zip(a[1], b[1], strict=True):
        assert step == other_step
        assert losses == pytest.approx(others, abs=tolerance)
    # Muon moves all singular values to 1, also those that are only rounding: single weights may differ by
    # thousandths, a matrix as a whole hardly.
    for name, weight in b[0].items():
        assert (a[0][name] - weight).norm() < 0.02 * weight.norm(), name
