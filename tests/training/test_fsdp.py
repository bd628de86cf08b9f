"""Mode fsdp: shards and their states. test_distributed.py holds that it trains as mode fast does."""

import errno
import json
import os
import pickletools
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import BadConfig, DiskFull
from compactgpt.common.storage import sha256_file
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import save_model
from compactgpt.training.checkpoint import load_newest_state
from compactgpt.training.distributed import Group, init_process_group
from compactgpt.training.initialization import folder_sha256
from compactgpt.training.optim import Optimizers
from tests.support.distributed_training import parameters, train, train_and_stop
from tests.support.processes import run_ranks
from tests.support.tiny_training import make_tokens, params_of


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def stopped(tokens, tmp_path_factory):
    """The states of steps 2 and 3 of two processes."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run_ranks(2, train_and_stop, tokens, folder, parameters("fsdp")) == [0, 0]
    return folder / "state"


@pytest.fixture
def states(stopped, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(stopped, tmp_path / "state")


def load(folder, key=None, **changes):
    """Load the newest state in one process. Returns its step."""
    params = parameters("fsdp", **changes)
    model = GPT(params.model)
    tensors = {**model.state_dict(), **Optimizers(model, params.training).state}
    key = key or json.loads((folder / "step-00000002/manifest.json").read_text())["run_key"]
    found = load_newest_state(folder, key, tensors, Group(mode="fsdp"))
    return found[0] if found else None


def test_a_state_is_safetensors_and_json_and_each_process_wrote_its_half(stopped):
    state = stopped / "step-00000003"
    names = sorted(path.name for path in state.rglob("*"))
    shards = [name for name in names if name.endswith(".safetensors")]
    assert sorted({*names} - {*shards}) == ["manifest.json", "progress.json"]
    halves = [load_file(state / name) for name in shards]
    assert [half["wte.weight"].shape for half in halves] == [(24, 16), (24, 16)]
    assert "muon.momentum_buffer.h.0.attn.c_attn.weight" in halves[0]
    for path in state.rglob("*"):  # nothing hides a pickle, whatever it is called
        with pytest.raises(Exception):  # noqa: B017
            list(pickletools.genops(path.read_bytes()))


DAMAGES = {
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"~"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "a lost shard": lambda path: path.unlink(),
    "a lost manifest": lambda path: (path.parent / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_skipped_with_a_warning(states, caplog, damage):
    (states / ".step-00000004.1.tmp").mkdir()  # a killed process left it
    DAMAGES[damage](next((states / "step-00000003").glob("shard-00002*")))
    assert load(states) == 2
    assert "training state step-00000003 is skipped" in caplog.text
    assert not (states / ".step-00000004.1.tmp").exists()


def test_tensors_that_are_not_finite_or_of_another_shape_or_run_are_refused(states, caplog):
    assert load(states, model={"n_embd": 8}) is None
    assert "adamw.exp_avg.h.0.ln_1.weight is (16,), not (8,)" in caplog.text
    assert load(states, key="another") is None
    assert "belongs to another run" in caplog.text
    path = next((states / "step-00000003").glob("shard-00002*"))
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    poisoned = load_file(path)
    poisoned["wte.weight"][3, 3] = float("nan")
    save_file(poisoned, path, notes)
    manifest = path.parent / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest.write_text(json.dumps(facts))
    assert load(states) == 2
    assert "wte.weight holds numbers that are not finite" in caplog.text


def test_a_full_disk_of_one_process_leaves_the_state_before(tokens, tmp_path):
    assert run_ranks(2, _fill_disk_of_rank_1, tokens, tmp_path, parameters("fsdp")) == [0, 0]
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["best", "step-00000002"]


def _fill_disk_of_rank_1(tokens, folder, params):
    """The disk of process 1 is full from the second state on."""
    from compactgpt.training import fsdp

    is_main, times = os.environ["RANK"] == "0", iter(range(10))
    real = fsdp.HuggingFaceStorageWriter.write_data

    def write(self, plan, planner):
        if not is_main and next(times):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, plan, planner)

    fsdp.HuggingFaceStorageWriter.write_data = write
    with pytest.raises(DiskFull if is_main else SystemExit, match="no space left" if is_main else "0"):
        train(tokens, folder, params)


def test_a_folder_that_another_node_does_not_see_is_refused(tokens, tmp_path):
    assert run_ranks(2, _train_in_own_folder, tokens, tmp_path, parameters("fsdp")) == [0, 0]


def _train_in_own_folder(tokens, folder, params):
    with pytest.raises(BadConfig, match="disk that all nodes share"):
        train(tokens, folder / os.environ["RANK"], params)


def test_an_error_of_the_main_process_ends_the_others(tokens, tmp_path):
    base = parameters(model={"n_layer": 1})
    save_model(GPT(base.model), tmp_path / "base", {})
    start = {"init_from": str(tmp_path / "base"), "init_sha256": folder_sha256(tmp_path / "base")}
    assert run_ranks(2, _train_from_another_shape, tokens, tmp_path, parameters("fsdp", **start)) == [0, 0]


def _train_from_another_shape(tokens, folder, params):
    is_main = os.environ["RANK"] == "0"
    with pytest.raises(BadConfig if is_main else SystemExit, match=r"model\.n_layer" if is_main else "0"):
        train(tokens, folder, params)


def test_each_process_holds_its_share_and_muon_makes_the_same_updates(tmp_path):
    assert run_ranks(3, _compare_updates, tmp_path) == [0, 0, 0]


def _compare_updates(_folder):
    """Three processes, so that rows do not divide; the same updates as those of full tensors."""
    from torch.distributed.tensor import distribute_tensor

    from compactgpt.training.fsdp import full_model, orthogonalize_sharded, shard_model

    params = params_of(tokens_per_step=48)
    with init_process_group(params.training.launcher, "cpu") as group:
        source = GPT(params.model, 5)
        model = shard_model(source if group.is_main_process else None, params.model, "cpu")
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
        found = full_model(model, group.is_main_process)
        if group.is_main_process:
            for name, tensor in source.state_dict().items():
                torch.testing.assert_close(found.state_dict()[name], tensor, atol=2e-4, rtol=0)
        else:
            assert found.wte.weight.is_meta
