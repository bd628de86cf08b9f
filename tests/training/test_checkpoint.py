"""Models and training states come back as they were; damaged ones are refused or skipped."""

import copy
import json
import os
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import atomic_folder
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import load_model, save_model, write_tensors
from compactgpt.training.checkpoint import load_newest_state, prune_runs, save_state
from compactgpt.training.optim import Optimizers
from tests.support.tiny_training import random_batch, recipe, tiny_shape


@pytest.fixture
def saved(tmp_path):
    """A model on disk."""
    save_model(GPT(tiny_shape(bias=True), seed=4), tmp_path / "model", {"val_loss": 4.5})
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was_and_is_written_to_the_same_bytes(saved, tmp_path):
    model, loaded = GPT(tiny_shape(bias=True), seed=4), load_model(saved)
    assert loaded.shape == model.shape
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads((saved / "config.json").read_text())["facts"] == {"val_loss": 4.5}
    assert not any("lm_head" in name for name in load_file(saved / "model.safetensors"))  # the head is tied
    save_model(loaded, tmp_path / "again", {"val_loss": 4.5})
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_file_has_the_bytes_of_safetensors_own_writer_and_takes_little_memory_to_write(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"b": torch.ones(1024, 1024), "a": torch.ones(1 << 20)}
    tracemalloc.start()
    write_tensors(path, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert path.read_bytes() == save(tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_with_a_flipped_bit_is_refused(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(BadData, match=name):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("ln_f.weight"), "ln_f.weight is missing"),
        (lambda t, c: t.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda t, c: t.update({"wpe.weight": torch.zeros(9, 16)}), "wpe.weight is .9, 16."),
        (lambda t, c: t.update({"wpe.weight": t["wpe.weight"].double()}), "wpe.weight is .*float64"),
        (lambda t, c: t["wte.weight"][3].fill_(torch.nan), "wte.weight holds numbers that are not finite"),
        (lambda t, c: c["model"].update(padded_vocab_size=10**9), "too small for the shape"),
        (lambda t, c: c["model"].update(n_head=3), "does not describe a model"),
        (lambda t, c: c["model"].update(nhead=2), "does not describe a model"),
        (lambda t, c: c.pop("model"), "does not describe a model"),
    ],
)
def test_a_forged_model_with_a_valid_manifest_is_refused(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    change(tensors, config)
    with atomic_folder(saved, kind="model", overwrite=True) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadData, match=message):
        load_model(saved)


def test_a_missing_model_says_how_to_make_it(tmp_path):
    with pytest.raises(MissingInput, match="dvc repro"):
        load_model(tmp_path / "none")


class Run:
    """A run with a state saved after each of three steps."""

    def __init__(self, folder):
        self.folder, self.weights = folder, {}
        model = GPT(tiny_shape(), seed=1)
        optimizers = Optimizers(model, recipe())
        for step in (1, 2, 3):
            model(*random_batch(2, 8, seed=step)).backward()
            optimizers.update(step - 1, torch.tensor(0.5))
            tensors = {**model.state_dict(), **optimizers.state}
            save_state(folder, "key", step, tensors, {"at": step})
            self.weights[step] = model.wte.weight.detach().clone()

    def resume(self, key="key"):
        """What a new process finds, and its token embeddings then."""
        model = GPT(tiny_shape(), seed=9)
        tensors = {**model.state_dict(), **Optimizers(model, recipe()).state}
        return load_newest_state(self.folder, key, tensors), model.wte.weight


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("states") / "run")


@pytest.fixture
def run(complete_run, tmp_path):
    """A copy, to be damaged."""
    run = copy.copy(complete_run)
    run.folder = shutil.copytree(complete_run.folder, tmp_path / "run")
    return run


def test_the_newest_state_is_restored_and_two_are_kept(run):
    (run.folder / ".step-00000004.77.tmp").mkdir()  # a killed process left it
    found, weight = run.resume()
    assert found == (3, {"at": 3})
    assert torch.equal(weight, run.weights[3])
    assert sorted(path.name for path in run.folder.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("position", [0, 9, 0.5, -1])  # a header's length, the header, the middle, the end
@pytest.mark.parametrize("name", ["state.safetensors", "progress.json", "manifest.json"])
def test_a_state_with_a_flipped_bit_is_skipped_with_a_warning(run, name, position, caplog):
    path = run.folder / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if position == 0.5 else position] ^= 4
    path.write_bytes(content)
    found, weight = run.resume()
    assert found == (2, {"at": 2})
    assert torch.equal(weight, run.weights[2])
    assert "step-00000003 is skipped" in caplog.text


def test_without_a_valid_state_nothing_is_changed(run):
    (run.folder / "step-00000003/manifest.json").unlink()
    (run.folder / "step-00000002/state.safetensors").write_bytes(b"")
    found, weight = run.resume()
    assert found is None
    assert torch.equal(weight, GPT(tiny_shape(), seed=9).wte.weight)


def test_a_state_of_another_run_or_under_another_name_is_never_used(run):
    assert run.resume(key="other")[0] is None
    shutil.move(run.folder / "step-00000003", run.folder / "step-00000009")
    assert run.resume()[0][0] == 2


def test_states_of_other_runs_are_removed_except_for_the_two_written_last(tmp_path):
    for seconds, name in enumerate(["older", "old", "current", "new", "newer"]):
        (tmp_path / name / "step-00000001").mkdir(parents=True)
        os.utime(tmp_path / name, (seconds, seconds))
    prune_runs(tmp_path, "current")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "new", "newer"]
    prune_runs(tmp_path / "none", "current")
