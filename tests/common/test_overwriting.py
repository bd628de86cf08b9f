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

    def export(folder, *options):
        return CliRunner().invoke(app, ["export", str(folder), *options])

    done = export(".", "--overwrite")
    assert (done.exit_code, done.output.count("\n")) == (NotAllowed.exit_code, 1), done.output
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
        save_model(tiny_gpt(40), folder)


def test_data_docs_sweeps_and_references_of_the_gate_replace_no_other_files(tmp_path):
    (tmp_path / "page.html").write_text("my page")
    with pytest.raises(NotAllowed, match="did not write"):
        check_expectations("validation", [], tmp_path)
    ladder, data = tmp_path / "ladder.json", tmp_path / "data.json"
    ladder.write_text('{"steps": "to the roof"}')
    with pytest.raises(BadConfig, match="unknown key"):
        fit_sweep(ladder, Path("params.yaml"))
    data.write_text('{"measured": 1}')
    with pytest.raises(NotAllowed, match="not an accepted reference"):
        accept(None, "a reason", data, 10)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [
        '{"measured": 1}', '{"steps": "to the roof"}', "my page",
    ]  # fmt: skip


def test_only_folders_of_training_states_are_pruned(tmp_path):
    for name in "abc":
        (tmp_path / name / "step-00000001").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    os.utime(tmp_path / "photos", (1, 1))
    prune_runs(tmp_path, "d")
    assert max(path.name for path in tmp_path.iterdir()) == "photos"
    assert len(list(tmp_path.iterdir())) == 3
