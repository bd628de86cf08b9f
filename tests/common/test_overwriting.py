"""No command deletes or replaces files that it did not write."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import NotAllowed
from compactgpt.common.storage import atomic_folder, verified_manifest
from compactgpt.data.validation import check_expectations
from compactgpt.forecast.sweep import fit_sweep
from compactgpt.gate.references import accept
from compactgpt.training.checkpoint import prune_runs, save_model
from tests.support import tracking_store
from tests.support.tiny_models import tiny_gpt


def export(folder, *options, model):
    words = ["export", str(folder), "--model", str(model), "--tokenizer", str(model.parent / "tokenizer")]
    return CliRunner().invoke(app, [*words, *options])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with a trained model; the current folder."""
    root = tmp_path / "project"
    save_model(tiny_gpt(40), root / "models/compact", {})
    (root / "models/tokenizer").mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        (root / "models/tokenizer" / name).write_text("{}")
    tracking_store.git(root, "init", "-q")
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return root


@pytest.fixture
def thesis(tmp_path):
    path = tmp_path / "papers/thesis.tex"
    path.parent.mkdir()
    path.write_text("five years")
    return path


def test_export_refuses_a_folder_with_other_files(project, thesis):
    for options in ((), ("--overwrite",)):
        done = export(thesis.parent, *options, model=project / "models/compact")
        assert done.exit_code == NotAllowed.exit_code, done.output
        assert done.output.startswith("error: ")
        assert done.output.count("\n") == 1
        assert thesis.read_text() == "five years"


@pytest.mark.parametrize("where", [".", "..", "~", "../link"])
def test_export_refuses_the_repository_its_parent_the_home_folder_and_links_to_them(project, where):
    (project.parent / "link").symlink_to(project)
    folder = Path(where).expanduser()
    done = export(folder, "--overwrite", model=project / "models/compact")
    assert done.exit_code == NotAllowed.exit_code, done.output
    assert "never replaced" in done.output
    assert (project / ".git/HEAD").exists()
    assert (project / "models/compact/model.safetensors").exists()


def test_export_replaces_an_earlier_export_and_keeps_a_file_that_was_added(project, tmp_path):
    folder = tmp_path / "hf"
    for _ in range(2):
        assert export(folder, model=project / "models/compact").exit_code == 0
    (folder / "notes.txt").write_text("mine")
    done = export(folder, model=project / "models/compact")
    assert done.exit_code == NotAllowed.exit_code
    assert "notes.txt was changed since" in done.output
    assert "--overwrite" in done.output
    done = export(
        folder, "--overwrite", model=project / "models/compact"
    )  # replaces what changed, nothing else
    assert done.exit_code == NotAllowed.exit_code
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text("{}")
    assert export(folder, model=project / "models/compact").exit_code == NotAllowed.exit_code
    assert export(folder, "--overwrite", model=project / "models/compact").exit_code == 0
    verified_manifest(folder)


def test_a_manifest_of_another_tool_and_an_empty_folder_inside_an_export_are_kept(project, tmp_path):
    folder = tmp_path / "hf"
    export(folder, model=project / "models/compact")
    for name in ("webapp/manifest.json", "pictures/"):
        added = folder / name
        added.parent.mkdir(exist_ok=True)
        added.mkdir() if name.endswith("/") else added.write_text("{}")
        for options in ([], ["--overwrite"]):
            done = export(folder, *options, model=project / "models/compact")
            assert done.exit_code == NotAllowed.exit_code
        assert added.exists()
        added.rmdir() if added.is_dir() else (added.unlink(), added.parent.rmdir())


def test_a_website_is_no_data_docs(tmp_path):
    (tmp_path / "docs/static").mkdir(parents=True)
    (tmp_path / "docs/index.html").write_text("my page")
    with pytest.raises(NotAllowed, match="did not write"):
        check_expectations("validation", [], tmp_path / "docs")
    assert (tmp_path / "docs/index.html").read_text() == "my page"


def test_a_user_without_a_name_and_a_home_may_write(tmp_path, monkeypatch):
    """As in containers that run under a number."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    with atomic_folder(tmp_path / "out", kind="tokens") as temporary:
        (temporary / "a.txt").write_text("a")
    assert (tmp_path / "out/a.txt").exists()


def test_a_model_is_not_written_over_an_export(project, tmp_path):
    export(tmp_path / "hf", model=project / "models/compact")
    with pytest.raises(NotAllowed, match="did not write"):
        save_model(tiny_gpt(40), tmp_path / "hf", {})


def test_data_docs_refuse_a_folder_with_other_files(thesis):
    with pytest.raises(NotAllowed, match="did not write"):
        check_expectations("validation", [], thesis.parent)
    assert thesis.read_text() == "five years"


@pytest.mark.parametrize("name", ["ladder.json", "ladder.png"])
def test_ladder_refuses_to_replace_the_users_own_files(tmp_path, name):
    (tmp_path / name).write_text('{"steps": "to the roof"}')
    with pytest.raises(NotAllowed, match="did not write"):
        fit_sweep(["ladder-1"], lambda *_: pytest.fail("read"), tmp_path, tmp_path / "params.yaml")


def test_a_file_that_is_no_reference_is_not_replaced_by_one(tmp_path, thesis):
    (tmp_path / "data.json").write_text('{"measured": 1}')
    for path in (thesis, tmp_path / "data.json"):
        before = path.read_bytes()
        with pytest.raises(NotAllowed, match="not an accepted reference"):
            accept(None, "a reason", path, 10)
        assert path.read_bytes() == before


def test_only_folders_of_states_are_pruned(tmp_path):
    for name in "abc":
        (tmp_path / name / "step-00000001").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    os.utime(tmp_path / "photos", (1, 1))
    prune_runs(tmp_path, "d")
    assert max(path.name for path in tmp_path.iterdir()) == "photos"
    assert len(list(tmp_path.iterdir())) == 3
