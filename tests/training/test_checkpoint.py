"""Models and training states come back as they were; damaged ones are refused or skipped."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactgpt.common.errors import BadData
from compactgpt.common.storage import atomic_folder
from compactgpt.model.gpt import GPT
from compactgpt.model.weights import load_model, save_model
from compactgpt.training.checkpoint import load_newest_state, prune_runs, save_state
from tests.support.tiny_training import tiny_shape


@pytest.fixture
def model():
    return GPT(tiny_shape(bias=True), seed=4)


@pytest.fixture
def saved(model, tmp_path):
    """A model on disk."""
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was_and_is_written_to_the_same_bytes(model, saved, tmp_path):
    loaded = load_model(saved)
    assert (loaded.shape, loaded.training) == (model.shape, False)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    save_model(loaded, tmp_path / "again")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


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


@pytest.fixture
def run(tmp_path):
    """The folder of a run that saved a state after each of three steps."""
    for step in (1, 2, 3):
        save_state(tmp_path / "run", "key", step, {"w": torch.full((5, 3), float(step))}, {"at": step})
    return tmp_path / "run"


def resume(run, key="key"):
    """What a new process finds, and its weights then: those of the state's step."""
    tensors = {"w": torch.zeros(5, 3)}
    return load_newest_state(run, key, tensors), tensors["w"].unique().tolist()


def test_the_newest_state_is_restored_and_two_are_kept(run):
    (run / ".step-00000004.77.tmp").mkdir()  # a killed process left it
    assert resume(run) == ((3, {"at": 3}), [3.0])
    assert sorted(path.name for path in run.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("position", [0, 9, -1])  # a header's length, the header, the end
@pytest.mark.parametrize("name", ["state.safetensors", "progress.json", "manifest.json"])
def test_a_state_with_a_flipped_bit_is_skipped_with_a_warning(run, name, position, caplog):
    path = run / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    assert resume(run) == ((2, {"at": 2}), [2.0])
    assert "step-00000003 is skipped" in caplog.text


def test_a_state_that_is_damaged_or_of_another_run_or_step_is_never_used(run):
    assert resume(run, key="other") == (None, [0.0])
    (run / "step-00000003").rename(run / "step-00000009")
    assert resume(run)[0][0] == 2
    (run / "step-00000002/state.safetensors").write_bytes(b"")
    assert resume(run) == (None, [0.0])


def test_states_of_other_runs_are_removed_except_for_the_two_written_last(tmp_path):
    for seconds, name in enumerate(["older", "old", "current", "new", "newer"]):
        (tmp_path / name / "step-00000001").mkdir(parents=True)
        os.utime(tmp_path / name, (seconds, seconds))
    prune_runs(tmp_path, "current")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "new", "newer"]
