"""Several processes learn what one process learns, in both modes, and resume after a lost process."""

import itertools
import json
import os
import signal

import pytest

from compactgpt.common.device import DistInfo, dist_info
from compactgpt.common.errors import BadConfig, Busy, PeerLost
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import load_model, save_model
from compactgpt.training import trainer
from compactgpt.training.distributed import Group
from compactgpt.training.initialization import folder_sha256
from compactgpt.training.loss_curve import Row
from tests.support.processes import run_ranks
from tests.support.tiny_training import assert_same_bits, params_of

BY_MODE = pytest.mark.parametrize("mode", ["fast", "fsdp"])


def parameters(mode="fast", **changes):
    """Eight sequences a step, and clipping far below the norm of the gradients: a wrong norm would show."""
    return params_of(**{"tokens_per_step": 64, "grad_clip": 0.05, "launcher": {"mode": mode}, **changes})


def train(tokens, folder, params, stop_at=None, kill_at=None):
    """Train in this process; the main process leaves a model and rows.json.

    `stop_at` and `kill_at` are pairs (rank, step): one process is asked to stop, or is killed.
    """
    info, steps = dist_info(), itertools.count(1)

    def should_stop():
        now = (info.rank, next(steps))
        if now == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return now == stop_at

    def check_share(_step, model):
        if params.training.launcher.mode == "fsdp" and info.world_size > 1:
            held = sum(parameter.to_local().numel() for parameter in model.parameters())
            assert held < 1.1 * model.num_params / info.world_size

    callbacks = trainer.Callbacks(on_step=check_share, should_stop=should_stop)
    trained = trainer.train(params, trainer.open_splits(tokens), folder / "state", callbacks)
    if info.is_main_process:
        save_model(trained.model, folder / "model")
        (folder / "rows.json").write_text(json.dumps([trained.rows, trained.resumed_from]))


def run(folder, size, tokens, params):
    """Train in `size` processes, and return the result."""
    assert run_ranks(size, train, tokens, folder, params) == [0] * size
    rows, resumed_from = json.loads((folder / "rows.json").read_text())
    return trainer.Trained(load_model(folder / "model"), [Row(*row) for row in rows], resumed_from)


def assert_same_curve(a, b, tolerance=2e-5):
    for row, other in zip(a.rows, b.rows, strict=True):
        assert row == pytest.approx(other, abs=tolerance)
    # Muon moves all singular values to 1, also those that are only rounding: single weights may differ by
    # thousandths, a matrix as a whole hardly.
    found = a.model.state_dict()
    for name, weight in b.model.state_dict().items():
        assert (found[name] - weight).norm() < 0.02 * weight.norm(), name


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The result of one process."""
    return run(tmp_path_factory.mktemp("alone"), 1, tokens, parameters())


@BY_MODE
def test_two_processes_learn_what_one_learns_and_after_a_loss_resume_to_the_same_bits(
    tokens, tmp_path, alone, mode
):
    params = parameters(mode)
    uninterrupted = run(tmp_path / "whole", 2, tokens, params)
    assert_same_curve(uninterrupted, alone)
    assert run_ranks(2, _lose_rank_1, tokens, tmp_path / "lost", params) == [0, -signal.SIGKILL]
    found = run(tmp_path / "lost", 2, tokens, params)
    assert found.resumed_from == 4
    assert_same_bits(found, uninterrupted)


def _lose_rank_1(tokens, folder, params):
    """Process 1 is killed after step 5, for which there is no state."""
    with pytest.raises(PeerLost, match="ended or did not answer"):
        train(tokens, folder, params, kill_at=(1, 5))


ADAMW = {"optimizer": "adamw", "dtype": "bfloat16", "model": {"bias": True, "dropout": 0.2}}


@pytest.mark.parametrize(
    ("size", "changes", "tolerance"),
    [
        (2, {"head": "sampled", "sample_tokens": 12, "model": {"dropout": 0.2}}, 2e-5),
        (2, {"mode": "fsdp", **ADAMW}, 1e-3),
        (3, {"mode": "fsdp", "tokens_per_step": 48}, 2e-5),  # the rows do not divide by 3
    ],
    ids=["sampled-dropout", "fsdp-adamw-bfloat16", "fsdp-3"],
)
def test_other_recipes_have_the_loss_curve_of_one_process_too(tokens, tmp_path, size, changes, tolerance):
    params = parameters(**{"grad_clip": 1.0, **changes})
    one, several = (run(tmp_path / str(processes), processes, tokens, params) for processes in (1, size))
    assert_same_curve(one, several, tolerance)


@BY_MODE
def test_a_run_resumes_with_another_number_of_processes_and_warns_that_bits_differ(
    tokens, tmp_path, alone, mode
):
    params, warnings = parameters(mode), []
    assert run_ranks(2, _stop_after_step_3, tokens, tmp_path, params) == [0, 0]
    splits = trainer.open_splits(tokens)
    found = trainer.train(params, splits, tmp_path / "state", trainer.Callbacks(on_warning=warnings.append))
    assert found.resumed_from == 3
    assert_same_curve(found, alone)
    (warning,) = warnings
    assert "training.launcher.processes changed from 2 to 1 at step 3" in warning
    assert run_ranks(1, train, tokens, tmp_path / "more", params, None, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path / "more", 2, tokens, params)
    assert found.resumed_from == 4
    assert_same_curve(found, alone)


def _stop_after_step_3(tokens, folder, params):
    with pytest.raises(Busy, match=r"stopped at step 3 of 6"):
        train(tokens, folder, params, stop_at=(1, 3))


def test_the_slices_of_all_processes_make_up_the_batch():
    slices = [Group(DistInfo(rank, 3)).batch_slice(12, 2) for rank in range(3)]
    assert slices == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(BadConfig, match=r"8 sequences .* micro-batches of 2 among 3 processes"):
        Group(DistInfo(0, 3)).batch_slice(8, 2)


def test_a_mistake_that_only_processes_see_ends_all_of_them(tokens, tmp_path):
    """Process 1 has another params.yaml; then the main process finds a mistake, and the others just end."""
    assert run_ranks(2, _train_with_another_seed, tokens, tmp_path) == [0, 0]
    save_model(GPT(parameters(model={"n_layer": 1}).model), tmp_path / "base")
    start = {"init_from": str(tmp_path / "base"), "init_sha256": folder_sha256(tmp_path / "base")}
    assert run_ranks(2, _train_from_another_shape, tokens, tmp_path, parameters("fsdp", **start)) == [0, 0]


def _train_with_another_seed(tokens, folder):
    with pytest.raises(BadConfig, match=r"processes \[1\] differ from process 0 in their params.yaml"):
        train(tokens, folder, parameters(seed=dist_info().rank))


def _train_from_another_shape(tokens, folder, params):
    error, message = (BadConfig, r"model\.n_layer") if dist_info().is_main_process else (SystemExit, "0")
    with pytest.raises(error, match=message):
        train(tokens, folder, params)


def test_a_process_reads_its_rank_from_torchruns_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dist_info() == DistInfo(0, 1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert dist_info() == DistInfo(5, 8, 1)
