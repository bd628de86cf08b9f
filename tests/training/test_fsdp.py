"""Mode fsdp: a sharded model learns what one process learns, and any number of processes resumes it."""

import errno
import json
import os
import pickletools
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import BadConfig, DiskFull
from compactgpt.common.storage import sha256_file
from compactgpt.common.torchrun import DistInfo
from compactgpt.model.gpt import GPT
from compactgpt.training.checkpoint import save_model
from compactgpt.training.distributed import Group, init_process_group
from compactgpt.training.initialization import folder_sha256
from compactgpt.training.optim import Optimizers
from tests.support.distributed_training import assert_same_bits, bereft, parameters, run, stopped, train
from tests.support.processes import together
from tests.support.tiny_training import make_tokens, params_of

CLIPPED = {"grad_clip": 0.05}  # far below the norm of these gradients, so that a wrong norm would show


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """What one process makes, which mode fsdp leaves whole."""
    return run(tmp_path_factory.mktemp("alone"), 1, tokens, parameters("fsdp", **CLIPPED))


@pytest.fixture(scope="module")
def two(tokens, tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, tokens, parameters("fsdp", **CLIPPED))


def assert_same_within_rounding(a, b):
    for (step, *losses), (other_step, *others) in zip(a[1], b[1], strict=True):
        assert step == other_step
        assert losses == pytest.approx(others, abs=2e-5)
    # Muon pushes all singular values to 1, those too that are nothing but rounding: single weights may differ
    # by thousandths, a matrix as a whole hardly.
    assert a[0].keys() == b[0].keys()
    for name, weight in b[0].items():
        assert (a[0][name] - weight).norm() < 0.02 * weight.norm(), name


def test_one_process_alone_trains_as_in_any_mode(tokens, tmp_path, alone):
    fast = run(tmp_path, 1, tokens, parameters("fast", **CLIPPED))
    assert_same_bits(fast, alone)


def test_two_processes_have_the_loss_curve_of_one_within_rounding(alone, two):
    assert_same_within_rounding(two, alone)


def test_adamw_and_bfloat16_too(tokens, tmp_path):
    params = parameters("fsdp", optimizer="adamw", dtype="bfloat16", model={"bias": True, "dropout": 0.2})
    found = run(tmp_path / "2", 2, tokens, params), run(tmp_path / "1", 1, tokens, params)
    for (_, *losses), (_, *others) in zip(found[0][1], found[1][1], strict=True):
        assert losses == pytest.approx(others, abs=1e-3)


def stopped_after_three(tokens, folder, params):
    assert together(2, stopped, tokens, folder, params, 3) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def state_of_two(tokens, tmp_path_factory):
    """What two processes leave that were stopped after step 3: the states of steps 2 and 3."""
    return stopped_after_three(tokens, tmp_path_factory.mktemp("stopped"), parameters("fsdp", **CLIPPED))


def copied(folder, target):
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def test_a_run_stopped_and_started_again_ends_with_the_same_bits(tokens, tmp_path, state_of_two, two):
    found = run(copied(state_of_two, tmp_path), 2, tokens, parameters("fsdp", **CLIPPED))
    assert found[2] == 3
    assert_same_bits(found, two)


def test_a_state_of_two_goes_on_in_one(tokens, tmp_path, state_of_two, alone):
    found = run(copied(state_of_two, tmp_path), 1, tokens, parameters("fsdp", **CLIPPED))
    assert found[2] == 3
    assert_same_within_rounding(found, alone)


def test_a_state_of_one_goes_on_in_two(tokens, tmp_path, alone):
    params = parameters("fsdp", **CLIPPED)
    assert together(1, train, tokens, tmp_path, params, 0, (0, 5)) == [-signal.SIGKILL]
    found = run(tmp_path, 2, tokens, params)
    assert found[2] == 4
    assert_same_within_rounding(found, alone)


def test_who_loses_a_process_says_so_and_the_next_start_ends_with_the_same_bits(tokens, tmp_path, two):
    params = parameters("fsdp", **CLIPPED)
    assert together(2, _killed, tokens, tmp_path, params) == [0, -signal.SIGKILL]
    found = run(tmp_path, 2, tokens, params)
    assert found[2] == 4
    assert_same_bits(found, two)


def _killed(tokens, folder, params):
    """Process 1 is killed after step 5, which is no checkpoint."""
    if os.environ["RANK"] == "1":
        train(tokens, folder, params, 0, (1, 5))
    else:
        bereft(tokens, folder, params)


def test_a_state_is_safetensors_and_json_and_each_process_wrote_its_half(state_of_two):
    state = state_of_two / "state/step-00000003"
    files = sorted(path.name for path in state.rglob("*"))
    shards = [name for name in files if name.endswith(".safetensors")]
    assert sorted({*files} - {*shards}) == ["manifest.json", "progress.json"]
    assert len(shards) == 2
    halves = [load_file(state / name) for name in shards]
    assert halves[0]["wte.weight"].shape == halves[1]["wte.weight"].shape == (24, 16)
    assert "muon.momentum_buffer.h.0.attn.c_attn.weight" in halves[0]
    for path in state.rglob("*"):  # nothing hides a pickle, whatever it is called
        with pytest.raises(Exception):  # noqa: B017
            list(pickletools.genops(path.read_bytes()))


DAMAGES = {
    "a flipped bit": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "a lost shard": lambda path: path.unlink(),
    "a lost manifest": lambda path: (path.parent / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_it_used(state_of_two, tmp_path, caplog, damage):
    folder = copied(state_of_two, tmp_path) / "state"
    half_written = folder / ".step-00000004.1.tmp"
    half_written.mkdir()
    (half_written / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    DAMAGES[damage](next((folder / "step-00000003").glob("shard-00002*")))
    assert loaded(folder)[0] == 2
    assert "training state step-00000003 is passed over" in caplog.text
    assert not half_written.exists()


def loaded(folder, key=None, **changes):
    """What one process finds in a folder of states, and the tensors that it filled."""
    from compactgpt.training.fsdp import load_newest_sharded_state

    params = parameters("fsdp", **CLIPPED, **changes)
    model = GPT(params.model)
    optimizers = Optimizers(model, params.training)
    tensors = {**model.state_dict(), **optimizers.zero_state()}
    key = key or json.loads((folder / "step-00000002/manifest.json").read_text())["run_key"]
    found = load_newest_sharded_state(folder, key, tensors, Group(DistInfo(), "fsdp"))
    return (found[0] if found else None), tensors


def test_tensors_that_are_not_finite_or_of_another_shape_or_run_are_refused(state_of_two, tmp_path, caplog):
    folder = copied(state_of_two, tmp_path) / "state"
    assert loaded(folder, model={"n_embd": 8})[0] is None
    assert "adamw.exp_avg.h.0.ln_1.weight is (16,), not (8,)" in caplog.text
    assert loaded(folder, key="another")[0] is None
    assert "belongs to another run" in caplog.text
    path = next((folder / "step-00000003").glob("shard-00002*"))
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    poisoned = load_file(path)
    poisoned["wte.weight"][3, 3] = float("nan")
    manifest = path.parent / "manifest.json"
    facts = json.loads(manifest.read_text())
    save_file(poisoned, path, notes)
    facts["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest.write_text(json.dumps(facts))
    assert loaded(folder)[0] == 2
    assert "wte.weight holds numbers that are not finite" in caplog.text


def test_a_disk_that_refuses_one_process_is_one_sentence_and_leaves_the_state_before(tokens, tmp_path, two):
    params = parameters("fsdp", **CLIPPED)
    assert together(2, _refused, tokens, tmp_path, params) == [0, 0]
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["best", "step-00000002"]
    found = run(tmp_path, 2, tokens, params)
    assert found[2] == 2
    assert_same_bits(found, two)


def _refused(tokens, folder, params):
    """The disk of process 1 is full from the second state on."""
    from compactgpt.training import fsdp

    leads, times = os.environ["RANK"] == "0", iter(range(10))
    real = fsdp.HuggingFaceStorageWriter.write_data

    def write(self, plan, planner):
        if not leads and next(times):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, plan, planner)

    fsdp.HuggingFaceStorageWriter.write_data = write
    with pytest.raises(DiskFull if leads else SystemExit, match="no space left" if leads else "0"):
        train(tokens, folder, params)


def test_a_folder_that_another_node_does_not_see_is_refused(tokens, tmp_path):
    assert together(2, _elsewhere, tokens, tmp_path, parameters("fsdp")) == [0, 0]


def _elsewhere(tokens, folder, params):
    leads = os.environ["RANK"] == "0"
    with pytest.raises(
        BadConfig if leads else SystemExit, match="disk that all nodes share" if leads else "0"
    ):
        train(tokens, folder / os.environ["RANK"], params)


def test_weights_to_start_from_that_do_not_fit_are_told_once(tokens, tmp_path):
    base = parameters(model={"n_layer": 1})
    save_model(GPT(base.model), tmp_path / "base", {})
    params = parameters(
        "fsdp", init_from=str(tmp_path / "base"), init_sha256=folder_sha256(tmp_path / "base")
    )
    assert together(2, _misled, tokens, tmp_path, params) == [0, 0]


def _misled(tokens, folder, params):
    leads = os.environ["RANK"] == "0"
    with pytest.raises(BadConfig if leads else SystemExit, match=r"model\.n_layer" if leads else "0"):
        train(tokens, folder, params)


def test_each_process_holds_its_share_and_muon_makes_the_same_updates(tokens, tmp_path):
    assert together(3, _compared, tmp_path) == [0, 0, 0]


def _compared(folder):
    """Three processes, so that rows do not divide; weights, gradients and updates held against whole ones."""
    from torch.distributed.tensor import distribute_tensor

    from compactgpt.training.fsdp import full_model, orthogonalise_sharded, shard_model

    params = params_of(tokens_per_step=48)
    with init_process_group(params.training.launcher, "cpu") as group:
        source = GPT(params.model, 5)
        model = shard_model(source if group.is_main_process else None, params.model, "cpu")
        whole = Optimizers(source, params.training)
        parts = Optimizers(model, params.training, orthogonalise_sharded)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert held < 1.1 * source.num_params / 3
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
                theirs.grad = torch.randn(theirs.shape, generator=generator)
                mine.grad = distribute_tensor(theirs.grad, mine.device_mesh, mine.placements)
            norm = parts.grad_norm().full_tensor()
            torch.testing.assert_close(norm, whole.grad_norm())
            parts.update(step, norm)
            whole.update(step, norm)
        found = full_model(model, group.is_main_process)
        if group.is_main_process:
            for name, tensor in source.state_dict().items():
                torch.testing.assert_close(found.state_dict()[name], tensor, atol=2e-4, rtol=0)
        else:
            assert found.wte.weight.is_meta
