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


def test_export_replaces_an_earlier_export_and_keeps_a_file_that_was_added(tmp_path, monkeypatch):
    save_model(tiny_gpt(40), tmp_path / "project/models/compact")
    save_tokenizer(tmp_path / "project/data/tokenizer")
    monkeypatch.chdir(tmp_path / "project")
    folder = tmp_path / "hf"

    def export(*words):
        return CliRunner().invoke(app, ["export", *map(str, words)]).exit_code

    assert export(".", "--overwrite") == NotAllowed.exit_code
    assert [export(folder), export(folder)] == [0, 0]
    (folder / "config.json").write_text("{}")
    assert export(folder) == NotAllowed.exit_code
    assert export(folder, "--overwrite") == 0
    verified_manifest(folder)
    (folder / "notes.txt").write_text("mine")
    assert export(folder, "--overwrite") == NotAllowed.exit_code
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(NotAllowed, match="did not write"):  # a model is not an export
        save_model(tiny_gpt(40), folder)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: check_expectations("validation", [], path.parent), "did not write"),
        (lambda path: fit_sweep(path, Path("params.yaml")), "unknown key"),
        (lambda path: accept(None, "a reason", path, 10), "not an accepted reference"),
    ],
)
def test_data_docs_sweeps_and_references_of_the_gate_replace_no_other_files(tmp_path, write, message):
    (tmp_path / "mine.json").write_text('{"steps": "to the roof"}')
    with pytest.raises((BadConfig, NotAllowed), match=message):
        write(tmp_path / "mine.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"steps": "to the roof"}']


def test_only_folders_of_training_states_are_pruned(tmp_path):
    for name in "abc":
        (tmp_path / name / "step-00000001").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    os.utime(tmp_path / "photos", (1, 1))
    prune_runs(tmp_path, "d")
    assert max(path.name for path in tmp_path.iterdir()) == "photos"
    assert len(list(tmp_path.iterdir())) == 3
