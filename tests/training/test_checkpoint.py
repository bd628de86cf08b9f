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
from compactgpt.training import checkpoint
from compactgpt.training.checkpoint import load_model, load_newest_state, prune_runs, save_model, save_state
from compactgpt.training.optim import Optimizers
from tests.support.tiny_gpt import tiny, tokens_of
from tests.support.training_recipe import recipe


@pytest.fixture
def saved(tmp_path):
    """A model on disk."""
    save_model(GPT(tiny(bias=True), seed=4), tmp_path / "model", {"val_loss": 4.5})
    return tmp_path / "model"


def rewrite(folder, change):
    """Change a model's files and make their manifest anew, as a forger would."""
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    with atomic_folder(folder, kind="model", overwrite=True) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config))


def test_a_model_comes_back_as_it_was(saved):
    model, loaded = GPT(tiny(bias=True), seed=4), load_model(saved, "cpu")
    assert loaded.shape == model.shape
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads((saved / "config.json").read_text())["facts"] == {"val_loss": 4.5}


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    save_model(GPT(tiny(bias=True), seed=4), tmp_path / "again", {"val_loss": 4.5})
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_file_is_what_safetensors_own_writer_makes(states):
    found = list(states.folder.glob("step-*/*.safetensors"))
    assert len(found) == 4
    assert [path.read_bytes() for path in found] == [save(load_file(path)) for path in found]


def test_writing_takes_little_memory_whatever_the_size(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"b": torch.ones(1024, 1024), "a": torch.ones(1 << 20)}
    tracemalloc.start()
    checkpoint._write_tensors(path, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert path.read_bytes() == save(tensors)


def test_the_head_is_stored_once(saved):
    assert not any("lm_head" in name for name in load_file(saved / "model.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_refused(saved, name):
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
        (lambda t, c: c["model"].update(n_head=3), "describes no model"),
        (lambda t, c: c["model"].update(nhead=2), "describes no model"),
        (lambda t, c: c.pop("model"), "describes no model"),
    ],
)
def test_a_forged_model_is_refused_by_name(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(BadData, match=message):
        load_model(saved)


def test_a_missing_model_says_how_to_make_it(tmp_path):
    with pytest.raises(MissingInput, match="dvc repro"):
        load_model(tmp_path / "none")


class States:
    """A run with one saved state a step."""

    def __init__(self, folder):
        self.folder = folder
        self.model = GPT(tiny(), seed=1)
        self.optimizers = Optimizers(self.model, recipe())
        self.weights = {}

    def advance(self, step):
        self.model(*tokens_of(2, 8, seed=step)).backward()
        self.optimizers.update(step - 1, torch.tensor(0.5))
        save_state(self.folder, "key", step, self.model, self.optimizers, {"at": step})
        self.weights[step] = self.model.wte.weight.detach().clone()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    run = States(tmp_path_factory.mktemp("states") / "run")
    for step in (1, 2, 3):
        run.advance(step)
    return run


@pytest.fixture
def states(three_steps, tmp_path):
    """A copy, to be damaged."""
    run = copy.copy(three_steps)
    run.folder = shutil.copytree(three_steps.folder, tmp_path / "run")
    return run


def resume(states, key="key"):
    model = GPT(tiny(), seed=9)
    found = load_newest_state(states.folder, key, model, Optimizers(model, recipe()))
    return found, model.wte.weight


def test_the_newest_state_is_restored_and_two_are_kept(states):
    found, weight = resume(states)
    assert found == (3, {"at": 3})
    assert torch.equal(weight, states.weights[3])
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("place", [0, 9, 0.5, -1])  # a header's length, the header, the middle, the end
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"]
)
def test_a_flipped_bit_anywhere_in_a_state_is_named_and_the_one_before_it_used(states, name, place, caplog):
    path = states.folder / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if place == 0.5 else place] ^= 4
    path.write_bytes(content)
    assert resume(states)[0] == (2, {"at": 2})
    assert "step-00000003" in caplog.text


def test_every_byte_of_a_states_manifest_counts(states):
    state = states.folder / "step-00000003"
    path = state / "manifest.json"
    whole = path.read_bytes()
    for place, letter in enumerate(whole):
        if not chr(letter).isspace():
            path.write_bytes(whole[:place] + bytes([letter ^ 1]) + whole[place + 1 :])
            with pytest.raises((BadData, MissingInput)):
                checkpoint._load_state(state, "key", states.model, states.optimizers)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(states, name, caplog):
    path = states.folder / "step-00000003" / name
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    found, weight = resume(states)
    assert found == (2, {"at": 2})
    assert torch.equal(weight, states.weights[2])
    assert "step-00000003 is passed over" in caplog.text
    assert name in caplog.text


def test_a_state_without_manifest_is_passed_over(states, caplog):
    (states.folder / "step-00000003" / "manifest.json").unlink()
    assert resume(states)[0][0] == 2
    assert "step-00000003" in caplog.text


def test_when_no_state_is_whole_nothing_is_changed(states):
    for state in states.folder.iterdir():
        (state / "optimizer.safetensors").write_bytes(b"")
    found, weight = resume(states)
    assert found is None
    assert torch.equal(weight, GPT(tiny(), seed=9).wte.weight)


def test_a_state_of_another_run_or_under_another_name_is_never_used(states):
    assert resume(states, key="other")[0] is None
    shutil.move(states.folder / "step-00000003", states.folder / "step-00000009")
    assert resume(states)[0][0] == 2


def test_what_a_killed_writer_left_is_swept(states):
    (states.folder / ".step-00000004.77.tmp").mkdir()
    assert resume(states)[0][0] == 3
    assert not list(states.folder.glob(".step-*"))


def test_states_of_other_runs_are_removed_but_for_the_two_written_last(tmp_path):
    for seconds, name in enumerate(["older", "old", "present", "new", "newer"]):
        (tmp_path / name / "step-00000001").mkdir(parents=True)
        os.utime(tmp_path / name, (seconds, seconds))
    prune_runs(tmp_path, "present")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "newer", "present"]
    prune_runs(tmp_path / "none", "present")
