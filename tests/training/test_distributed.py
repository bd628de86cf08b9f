"""Several processes learn what one process learns, in both modes, and resume after a lost process."""

import os
import signal

import pytest

from compactgpt.common.errors import BadConfig
from compactgpt.common.torchrun import DistInfo, dist_info
from compactgpt.training import trainer
from compactgpt.training.distributed import Group
from tests.support.distributed_training import (
    assert_same_bits,
    assert_same_curve,
    parameters,
    run,
    train,
    train_and_lose_rank_1,
    train_and_stop,
)
from tests.support.processes import run_ranks
from tests.support.tiny_training import make_tokens, params_of

CLIPPED = {"grad_clip": 0.05}  # far below the norm of these gradients, so that a wrong norm would show
BY_MODE = pytest.mark.parametrize("mode", ["fast", "fsdp"])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The result of one process."""
    return run(tmp_path_factory.mktemp("alone"), 1, tokens, parameters(**CLIPPED))


@pytest.fixture(scope="module")
def uninterrupted(tokens, tmp_path_factory):
    """By mode, the result of two processes that nothing interrupts."""
    return {
        mode: run(tmp_path_factory.mktemp(mode), 2, tokens, parameters(mode, **CLIPPED))
        for mode in ("fast", "fsdp")
    }


@BY_MODE
def test_two_processes_have_the_loss_curve_of_one_within_rounding(alone, uninterrupted, mode):
    assert_same_curve(uninterrupted[mode], alone)


def test_one_process_in_mode_fsdp_has_the_same_bits_as_in_mode_fast(tokens, tmp_path, alone):
    assert_same_bits(run(tmp_path, 1, tokens, parameters("fsdp", **CLIPPED)), alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "sampled", "sample_tokens": 12, "model": {"dropout": 0.2}},
        {"mode": "fsdp", "optimizer": "adamw", "dtype": "bfloat16", "model": {"bias": True, "dropout": 0.2}},
    ],
    ids=["sampled-dropout", "fsdp-adamw-bfloat16"],
)
def test_other_recipes_have_the_loss_curve_of_one_process_too(tokens, tmp_path, changes):
    one, two = (run(tmp_path / str(size), size, tokens, parameters(**changes)) for size in (1, 2))
    assert_same_curve(one, two, 1e-3 if "mode" in changes else 2e-5)


@BY_MODE
def test_a_lost_process_is_reported_and_the_run_resumes_to_the_same_bits(
    tokens, tmp_path, uninterrupted, mode
):
    params = parameters(mode, **CLIPPED)
    assert run_ranks(2, train_and_lose_rank_1, tokens, tmp_path, params) == [0, -signal.SIGKILL]
    found = run(tmp_path, 2, tokens, params)
    assert found[2] == 4
    assert_same_bits(found, uninterrupted[mode])


@BY_MODE
def test_one_process_resumes_a_run_of_two_and_warns_that_bits_differ(tokens, tmp_path, alone, mode):
    params, warnings = parameters(mode, **CLIPPED), []
    assert run_ranks(2, train_and_stop, tokens, tmp_path, params) == [0, 0]
    splits = trainer.open_splits(tokens)
    found = trainer.train(params, splits, tmp_path / "state", trainer.Callbacks(on_warning=warnings.append))
    assert found.resumed_from == 3
    assert_same_curve((found.model.state_dict(), found.rows), alone)
    (warning,) = warnings
    assert "training.launcher.processes was 2 up to step 3 and is now 1" in warning


@BY_MODE
def test_two_processes_resume_a_run_of_one(tokens, tmp_path, alone, mode):
    params = parameters(mode, **CLIPPED)
    assert run_ranks(1, train, tokens, tmp_path, params, 0, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path, 2, tokens, params)
    assert found[2] == 4
    assert_same_curve(found, alone)


def test_the_slices_of_all_processes_make_up_the_batch():
    slices = [Group(DistInfo(rank, 3)).batch_slice(12, 2) for rank in range(3)]
    assert [list(range(12))[rows] for rows in slices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(BadConfig, match=r"8 sequences .* micro-batches of 2 .* among 3 processes"):
        Group(DistInfo(0, 3)).batch_slice(8, 2)


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"processes": 3}, "tokens_per_step .32. must be a multiple .* training.launcher.processes .48."),
        ({"mode": "strict"}, "training.launcher.mode: found \"strict\"; input should be 'fast' or 'fsdp'"),
    ],
)
def test_impossible_launchers_are_refused(launcher, message):
    with pytest.raises(BadConfig, match=message):
        params_of(launcher=launcher)


def test_processes_with_other_params_are_refused(tokens, tmp_path):
    assert run_ranks(2, _train_with_another_seed, tokens, tmp_path) == [0, 0]


def _train_with_another_seed(tokens, folder):
    with pytest.raises(BadConfig, match=r"processes \[1\] have another params.yaml"):
        train(tokens, folder, parameters(seed=int(os.environ["RANK"])))


def test_a_process_reads_its_rank_from_torchruns_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dist_info() == DistInfo(0, 1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert dist_info() == DistInfo(5, 8, 1)
    assert not dist_info().is_main_process
