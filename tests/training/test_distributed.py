"""Several processes train one model together: to the result of one process, within rounding."""

import os
import signal

import pytest
import torch

from compactgpt.common.errors import BadConfig
from compactgpt.common.torchrun import DistInfo
from compactgpt.training import trainer
from compactgpt.training.distributed import Group
from tests.support.distributed_training import assert_same_bits, bereft, parameters, run, stopped, train
from tests.support.processes import together
from tests.support.tiny_training import make_tokens, params_of


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The outcome of one process."""
    return run(tmp_path_factory.mktemp("alone"), 1, tokens, parameters())


@pytest.fixture(scope="module")
def two(tokens, tmp_path_factory):
    """The outcome of two processes that nothing interrupts."""
    return run(tmp_path_factory.mktemp("two"), 2, tokens, parameters())


def assert_same_within_rounding(a, b):
    for (step, *losses), (other_step, *others) in zip(a[1], b[1], strict=True):
        assert step == other_step
        assert losses == pytest.approx(others, abs=2e-5)
    torch.testing.assert_close(a[0], b[0], atol=1e-3, rtol=0)


def test_two_processes_have_the_loss_curve_of_one_within_rounding(alone, two):
    assert_same_within_rounding(two, alone)


def test_a_sampled_softmax_too_since_all_processes_draw_the_same_sample(tokens, tmp_path):
    params = parameters(head="sampled", sample_tokens=12)
    one = run(tmp_path / "1", 1, tokens, params)
    assert_same_within_rounding(one, run(tmp_path / "2", 2, tokens, params))


def test_dropout_too(tokens, tmp_path):
    params = parameters(model={"dropout": 0.2})
    found = [run(tmp_path / str(size), size, tokens, params) for size in (1, 2)]
    assert_same_within_rounding(*found)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(tokens, tmp_path, alone, sizes):
    if sizes[0] == 2:
        assert together(2, stopped, tokens, tmp_path, parameters(), 3) == [0, 0]
    else:
        assert together(1, train, tokens, tmp_path, parameters(), 0, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path, sizes[1], tokens, parameters())
    assert found[2] == (3 if sizes[0] == 2 else 4)
    assert_same_within_rounding(found, alone)


def test_a_run_resumed_with_another_number_of_processes_warns_that_bits_differ(tokens, tmp_path):
    assert together(2, stopped, tokens, tmp_path, parameters(), 3) == [0, 0]
    warnings = []
    trainer.train(parameters(), trainer.open_splits(tokens), tmp_path / "state", tell=warnings.append)
    assert ["had 2 of training.launcher.processes, from here on 1" in text for text in warnings] == [True]


def test_a_lost_process_is_reported_and_the_next_start_ends_with_the_same_bits(tokens, tmp_path, two):
    assert together(2, _killed, tokens, tmp_path, parameters()) == [0, -signal.SIGKILL]
    found = run(tmp_path, 2, tokens, parameters())
    assert found[2] == 4
    assert_same_bits(found, two)


def _killed(tokens, folder, params):
    """Process 1 is killed after step 5, which is no checkpoint."""
    if os.environ["RANK"] == "1":
        train(tokens, folder, params, 0, (1, 5))
    else:
        bereft(tokens, folder, params)


@pytest.mark.parametrize(
    ("processes", "sequences", "message"),
    [(3, 8, "8 sequences .* micro-batches of 2 .* among 3 processes"), (2, 7, "7 sequences")],
)
def test_a_batch_that_does_not_divide_is_refused(processes, sequences, message):
    with pytest.raises(BadConfig, match=message):
        Group(DistInfo(0, processes), "fast").batch_slice(sequences, 2)


def test_the_slices_of_all_processes_are_the_batch():
    rows = [list(range(12))[Group(DistInfo(rank, 3), "fast").batch_slice(12, 2)] for rank in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"processes": 3}, "tokens_per_step .32. must be a multiple .* training.launcher.processes .48."),
        ({"mode": "strict"}, "training.launcher.mode: found \"strict\"; input should be 'fast' or 'fsdp'"),
    ],
)
def test_impossible_launchers_are_refused_before_any_work(launcher, message):
    with pytest.raises(BadConfig, match=message):
        params_of(launcher=launcher)


def test_processes_with_other_data_are_refused(tokens, tmp_path):
    assert together(2, _other_seed, tokens, tmp_path) == [0, 0]


def _other_seed(tokens, folder):
    with pytest.raises(BadConfig, match=r"processes \[1\] have another params.yaml"):
        train(tokens, folder, parameters(seed=int(os.environ["RANK"])))
