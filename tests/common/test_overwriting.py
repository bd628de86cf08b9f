"""No command deletes or replaces files that it did not write."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, NotAllowed
from compactgpt.common.storage import verified_manifest
from compactgpt.data.validation import check_expectations
from compactgpt.forecast.sweep import fit_sweep
from compactgpt.gate.references import accept
from compactgpt.model.weights import save_model
from compactgpt.training.checkpoint import prune_runs
from tests.support.tiny_models import save_tokenizer, tiny_gpt


@pytest.fixture
def export(tmp_path, monkeypatch):
    """The command `export` in a project with a trained model; returns its result."""
    project = tmp_path / "project"
    save_model(tiny_gpt(40), project / "models/compact", {})
    save_tokenizer(project / "data/tokenizer")
    (project / ".git").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return lambda folder, *options: CliRunner().invoke(app, ["export", str(folder), *options])


@pytest.fixture
def thesis(tmp_path):
    path = tmp_path / "papers/thesis.tex"
    path.parent.mkdir()
    path.write_text("five years")
    yield path
    assert path.read_text() == "five years"


def test_export_refuses_a_folder_with_other_files_and_protected_ones(export, thesis):
    for folder in (thesis.parent, ".", ".."):
        done = export(folder, "--overwrite")
        assert done.exit_code == NotAllowed.exit_code, done.output
        assert done.output.startswith("error: ")
        assert done.output.count("\n") == 1
    assert Path("models/compact/model.safetensors").exists()


def test_export_replaces_an_earlier_export_and_keeps_a_file_that_was_added(export, tmp_path):
    folder = tmp_path / "hf"
    for _ in range(2):
        assert export(folder).exit_code == 0
    (folder / "notes.txt").write_text("mine")
    for options in ((), ("--overwrite",)):
        done = export(folder, *options)
        assert done.exit_code == NotAllowed.exit_code
        assert "notes.txt is not in the manifest" in done.output
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text("{}")
    assert export(folder).exit_code == NotAllowed.exit_code
    assert export(folder, "--overwrite").exit_code == 0
    verified_manifest(folder)
    with pytest.raises(NotAllowed, match="did not write"):  # a model is not an export
        save_model(tiny_gpt(40), folder, {})


def test_data_docs_and_sweeps_refuse_folders_with_other_files(tmp_path, thesis):
    (tmp_path / "docs/static").mkdir(parents=True)
    (tmp_path / "docs/index.html").write_text("my page")
    for folder in (thesis.parent, tmp_path / "docs"):
        with pytest.raises(NotAllowed, match="did not write"):
            check_expectations("validation", [], folder)
    assert (tmp_path / "docs/index.html").read_text() == "my page"
    (tmp_path / "ladder.json").write_text('{"steps": "to the roof"}')
    with pytest.raises(BadConfig, match="unknown key"):
        fit_sweep(tmp_path / "ladder.json", Path("params.yaml"))
    assert "roof" in (tmp_path / "ladder.json").read_text()


def test_a_file_that_is_not_a_reference_of_the_gate_is_not_replaced(tmp_path, thesis):
    (tmp_path / "data.json").write_text('{"measured": 1}')
    for path in (thesis, tmp_path / "data.json"):
        with pytest.raises(NotAllowed, match="not an accepted reference"):
            accept(None, "a reason", path, 10)
    assert (tmp_path / "data.json").read_text() == '{"measured": 1}'


def test_only_folders_of_training_states_are_pruned(tmp_path):
    for name in "abc":
        (tmp_path / name / "step-00000001").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    os.utime(tmp_path / "photos", (1, 1))
    prune_runs(tmp_path, "d")
    assert max(path.name for path in tmp_path.iterdir()) == "photos"
    assert len(list(tmp_path.iterdir())) == 3
