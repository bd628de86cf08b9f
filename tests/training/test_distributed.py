"""Several processes learn what one process learns, in both modes, and resume after a lost process."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.device import DistInfo, dist_info
from compactgpt.common.errors import BadConfig, Busy, PeerLost
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import save_model
from compactgpt.training import trainer
from compactgpt.training.distributed import Group, init_process_group
from compactgpt.training.initialization import folder_sha256
from compactgpt.training.optim import Optimizers
from tests.support.processes import run_ranks
from tests.support.tiny_training import params_of

BY_MODE = pytest.mark.parametrize("mode", ["fast", "fsdp"])


def parameters(mode="fast", **changes):
    """Eight sequences a step, and clipping far below the norm of the gradients: a wrong norm would show."""
    return params_of(**{"tokens_per_step": 64, "grad_clip": 0.05, "launcher": {"mode": mode}, **changes})


def train(tokens, folder, params, stop_at=0, kill_at=None):
    """Train in this process; the main process leaves weights.safetensors and rows.json."""
    rank = int(os.environ.get("RANK", "0"))
    steps = []

    def note(losses):
        steps.append(losses[-1][0])
        if (rank, steps[-1]) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks = trainer.Callbacks(
        on_losses=note,
        should_stop=lambda: rank == 1 and steps[-1] == stop_at,  # one process is asked, all stop
    )
    trained = trainer.train(params, trainer.open_splits(tokens), folder / "state", callbacks)
    if rank == 0:
        save_file(trained.model.state_dict(), folder / "weights.safetensors")
        (folder / "rows.json").write_text(json.dumps([trained.resumed_from, trained.rows]))


def run(folder, size, tokens, params):
    """Train in `size` processes. Returns weights, loss curve and the step that the run resumed from."""
    folder.mkdir(exist_ok=True)
    assert run_ranks(size, train, tokens, folder, params) == [0] * size
    resumed_from, rows = json.loads((folder / "rows.json").read_text())
    return load_file(folder / "weights.safetensors"), rows, resumed_from


def assert_same_bits(a, b):
    (weights, rows, _), (others, other_rows, _) = a, b
    assert rows == other_rows
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def assert_same_curve(a, b, tolerance=2e-5):
    for (step, *losses), (other_step, *others) in zip(a[1], b[1], strict=True):
        assert step == other_step
        assert losses == pytest.approx(others, abs=tolerance)
    # Muon moves all singular values to 1, also those that are only rounding: single weights may differ by
    # thousandths, a matrix as a whole hardly.
    for name, weight in b[0].items():
        assert (a[0][name] - weight).norm() < 0.02 * weight.norm(), name


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
    (tmp_path / "lost").mkdir()
    assert run_ranks(2, _lose_rank_1, tokens, tmp_path / "lost", params) == [0, -signal.SIGKILL]
    found = run(tmp_path / "lost", 2, tokens, params)
    assert found[2] == 4
    assert_same_bits(found, uninterrupted)


def _lose_rank_1(tokens, folder, params):
    """Process 1 is killed after step 5, for which there is no state."""
    if os.environ["RANK"] == "1":
        train(tokens, folder, params, kill_at=(1, 5))
    with pytest.raises(PeerLost, match="ended or did not answer"):
        train(tokens, folder, params)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "sampled", "sample_tokens": 12, "model": {"dropout": 0.2}},
        {"mode": "fsdp", "optimizer": "adamw", "dtype": "bfloat16", "model": {"bias": True, "dropout": 0.2}},
    ],
    ids=["sampled-dropout", "fsdp-adamw-bfloat16"],
)
def test_other_recipes_have_the_loss_curve_of_one_process_too(tokens, tmp_path, changes):
    params = parameters(**{"grad_clip": 1.0, **changes})
    one, two = (run(tmp_path / str(size), size, tokens, params) for size in (1, 2))
    assert_same_curve(one, two, 1e-3 if "mode" in changes else 2e-5)


@BY_MODE
def test_a_run_resumes_with_another_number_of_processes_and_warns_that_bits_differ(
    tokens, tmp_path, alone, mode
):
    params, warnings = parameters(mode), []
    assert run_ranks(2, _stop_after_step_3, tokens, tmp_path, params) == [0, 0]
    splits = trainer.open_splits(tokens)
    found = trainer.train(params, splits, tmp_path / "state", trainer.Callbacks(on_warning=warnings.append))
    assert found.resumed_from == 3
    assert_same_curve((found.model.state_dict(), found.rows), alone)
    (warning,) = warnings
    assert "training.launcher.processes was 2 up to step 3 and is now 1" in warning
    (tmp_path / "more").mkdir()
    assert run_ranks(1, train, tokens, tmp_path / "more", params, 0, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path / "more", 2, tokens, params)
    assert found[2] == 4
    assert_same_curve(found, alone)


def _stop_after_step_3(tokens, folder, params):
    with pytest.raises(Busy, match=r"stopped at step 3 of 6"):
        train(tokens, folder, params, stop_at=3)


def test_the_slices_of_all_processes_make_up_the_batch():
    slices = [Group(DistInfo(rank, 3)).batch_slice(12, 2) for rank in range(3)]
    assert [list(range(12))[rows] for rows in slices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(BadConfig, match=r"8 sequences .* micro-batches of 2 among 3 processes"):
        Group(DistInfo(0, 3)).batch_slice(8, 2)


def test_a_mistake_that_only_processes_see_ends_all_of_them(tokens, tmp_path):
    """Process 1 has another params.yaml; then the main process finds a mistake, and the others just end."""
    assert run_ranks(2, _train_with_another_seed, tokens, tmp_path) == [0, 0]
    base = parameters(model={"n_layer": 1})
    save_model(GPT(base.model), tmp_path / "base")
    start = {"init_from": str(tmp_path / "base"), "init_sha256": folder_sha256(tmp_path / "base")}
    assert run_ranks(2, _train_from_another_shape, tokens, tmp_path, parameters("fsdp", **start)) == [0, 0]


def _train_with_another_seed(tokens, folder):
    with pytest.raises(BadConfig, match=r"processes \[1\] have another params.yaml"):
        train(tokens, folder, parameters(seed=int(os.environ["RANK"])))


def _train_from_another_shape(tokens, folder, params):
    is_main = os.environ["RANK"] == "0"
    with pytest.raises(BadConfig if is_main else SystemExit, match=r"model\.n_layer" if is_main else "0"):
        train(tokens, folder, params)


def test_a_process_reads_its_rank_from_torchruns_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dist_info() == DistInfo(0, 1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert dist_info() == DistInfo(5, 8, 1)


def test_in_mode_fsdp_each_process_holds_its_share_and_muon_makes_the_same_updates(tmp_path):
    assert run_ranks(3, _compare_updates, tmp_path) == [0, 0, 0]


def _compare_updates(_folder):
    """Three processes, so that rows do not divide; the same updates as those of full tensors."""
    from torch.distributed.tensor import distribute_tensor

    from compactgpt.training.fsdp import orthogonalize_sharded, shard_model

    params = params_of(tokens_per_step=48, launcher={"mode": "fsdp"})
    with init_process_group(params.training.launcher, "cpu") as group:
        source = GPT(params.model, 5)
        weights = source.state_dict() if group.is_main_process else {}
        model = shard_model(weights, params.model, "cpu", group)
        full = Optimizers(source, params.training)
        sharded = Optimizers(model, params.training, orthogonalize_sharded)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert held < 1.1 * source.num_params / 3
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
                theirs.grad = torch.randn(theirs.shape, generator=generator)
                mine.grad = distribute_tensor(theirs.grad, mine.device_mesh, mine.placements)
            norm = sharded.grad_norm()
            torch.testing.assert_close(norm, full.grad_norm())
            sharded.update(step, norm)
            full.update(step, norm)
        found = group.gather(model.state_dict())
        if group.is_main_process:
            for name, tensor in source.state_dict().items():
                torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=0)
