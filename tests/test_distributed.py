"""Several processes train the model of one: within rounding, or in mode strict to the bit."""

import json
import math
import os
import signal

import pytest
import torch
from forks import together
from safetensors.torch import load_file, save_file
from test_training import make_tokens, params_of

from compactgpt import training
from compactgpt.distributed import Group
from compactgpt.errors import BadConfig, Busy, PeerLost
from compactgpt.launching import Place

STEP = 64  # tokens: eight sequences, four micro-batches of two


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


def parameters(mode="fast", **changes):
    return params_of(tokens_per_step=STEP, launcher={"mode": mode}, **changes)


def train(tokens, folder, params, stop_at=0, kill=()):
    """Train in this process; the one that leads leaves weights.safetensors and rows.json."""
    rank = int(os.environ.get("RANK", "0"))
    steps = []

    def note(step, _values):
        steps.append(step)
        if (rank, step) == tuple(kill):
            os.kill(os.getpid(), signal.SIGKILL)

    trained = training.train(
        params,
        training.open_splits(tokens),
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


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The outcome of one process, by mode."""
    base = tmp_path_factory.mktemp("alone")
    return {mode: run(base / mode, 1, tokens, parameters(mode)) for mode in ("fast", "strict")}


def test_two_processes_have_the_loss_curve_of_one_within_rounding(tokens, tmp_path, alone):
    weights, rows, _ = run(tmp_path, 2, tokens, parameters())
    for (step, *losses), (other_step, *others) in zip(rows, alone["fast"][1], strict=True):
        assert step == other_step
        assert losses == pytest.approx(others, abs=2e-5)
    torch.testing.assert_close(weights, alone["fast"][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_in_mode_strict_the_number_of_processes_changes_no_bit(tokens, tmp_path, alone, size):
    assert_same_bits(run(tmp_path, size, tokens, parameters("strict")), alone["strict"])


def test_dropout_too(tokens, tmp_path):
    params = parameters("strict", model={"dropout": 0.2})
    assert_same_bits(run(tmp_path / "1", 1, tokens, params), run(tmp_path / "2", 2, tokens, params))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tokens, tmp_path, alone, sizes):
    params = parameters("strict")
    if sizes[0] == 2:
        assert together(2, stopped, tokens, tmp_path, params, 3) == [0, 0]
    else:
        assert together(1, train, tokens, tmp_path, params, 0, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path, sizes[1], tokens, params)
    assert found[2] == (3 if sizes[0] == 2 else 4)
    assert_same_bits(found, alone["strict"])


@pytest.mark.parametrize("mode", ["fast", "strict"])
def test_another_number_of_processes_is_told_where_it_changes_bits(tokens, tmp_path, alone, mode):
    assert together(2, stopped, tokens, tmp_path, parameters(mode), 3) == [0, 0]
    told = []
    trained = training.train(
        parameters(mode), training.open_splits(tokens), tmp_path / "state", tell=told.append
    )
    torch.testing.assert_close(trained.model.state_dict(), alone[mode][0], atol=1e-3, rtol=0)
    assert ["had 2 of training.launcher.processes, from here on 1" in text for text in told] == [True] * (
        mode == "fast"
    )


def test_who_loses_a_process_says_so_and_the_next_start_ends_with_the_same_bits(tokens, tmp_path, alone):
    assert together(2, _killed, tokens, tmp_path, parameters("strict")) == [0, -signal.SIGKILL]
    found = run(tmp_path, 2, tokens, parameters("strict"))
    assert found[2] == 4
    assert_same_bits(found, alone["strict"])


def _killed(tokens, folder, params):
    """Process 1 is killed after step 5, which is no checkpoint."""
    if os.environ["RANK"] == "1":
        train(tokens, folder, params, 0, (1, 5))
    else:
        bereft(tokens, folder, params)


def test_the_tree_is_the_sum_in_a_fixed_order():
    values = [1e8, 1.0, -1e8, 1.0, 3.0]
    parameter = torch.nn.Parameter(torch.zeros(1))

    def leaf(number):
        (parameter * values[number]).sum().backward()
        return torch.tensor(values[number])

    loss = Group(Place(), "strict").gradient([parameter], 4, leaf)
    by_hand = (torch.tensor(1e8) + 1.0) + (torch.tensor(-1e8) + 1.0)
    assert loss == parameter.grad.item() == by_hand.item()
    parameter.grad = None
    Group(Place(), "strict").gradient([parameter], 5, leaf)
    assert parameter.grad.item() == pytest.approx(math.fsum(values), abs=8)


@pytest.mark.parametrize(
    ("place", "mode", "sequences", "message"),
    [
        (Place(0, 3), "fast", 8, "8 sequences .* micro-batches of 2 .* among 3 processes"),
        (Place(0, 2), "fast", 7, "7 sequences"),
        (Place(0, 3), "strict", 12, "strict needs 1, 2, 4, 8, ... processes, found 3"),
    ],
)
def test_what_does_not_divide_is_refused(place, mode, sequences, message):
    with pytest.raises(BadConfig, match=message):
        Group(place, mode).rows(sequences, 2)


def test_every_row_is_somebodys():
    rows = [list(range(12))[Group(Place(rank, 3), "fast").rows(12, 2)] for rank in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"processes": 3}, "tokens_per_step .32. must be a multiple .* training.launcher.processes .48."),
        ({"processes": 3, "mode": "strict"}, "power of two"),
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
