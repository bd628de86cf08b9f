"""What a DVC user does by hand, on small projects with the real git and DVC."""

import shutil

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.errors import BadConfig, BadData
from tests.support.dvc_projects import dvc, git, git_repository, run

COPY = {"cmd": "cp params.yaml data/out && cp data/out report", "params": ["n"], "deps": ["input"]}
STAGE = COPY | {"outs": ["data/out"], "metrics": [{"report": {"cache": False}}]}
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed project of one stage that copies params.yaml, run once."""
    place = git_repository(tmp_path / "project", {"copy": STAGE})
    (place / "input").write_text("1")
    (place / "data").mkdir()
    (place / "params.yaml").write_text("n: 1\n")
    (place / ".gitignore").write_text("/data/\n")
    dvc(place, "repro", "-q")
    git(place, "add", ".")
    git(place, "commit", "-q", "-m", "first")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def conflict(project):
    """The project while a merge of two different runs is not resolved."""
    for branch, number in (("theirs", 2), ("main", 3)):
        git(project, "checkout", "-q", *(["-b"] if branch == "theirs" else []), branch)
        (project / "params.yaml").write_text(f"n: {number}\n")
        dvc(project, "repro", "-q")
        git(project, "commit", "-q", "-a", "-m", branch)
    assert run(project, "git", "merge", "theirs", check=False).returncode == 1
    return project


def test_a_lock_with_conflict_markers_is_left_to_the_user_who_is_told_what_to_do(conflict):
    lock = conflict / "dvc.lock"
    shutil.copytree(conflict / ".dvc/tmp", conflict / ".dvc/tmp/compactgpt", dirs_exist_ok=True)
    (conflict / ".dvc/tmp/compactgpt/dvc.lock").write_text("schema: '2.0'\nstages: {}\n")  # a stage's copy
    before = lock.read_bytes()
    assert b"<<<<<<< " in before
    done = CliRunner().invoke(app, ["repair"])
    assert done.exit_code == BadData.exit_code
    assert "dvc.lock has conflict markers of an unresolved merge: keep one side" in done.output
    assert lock.read_bytes() == before
    # The advice, as it is written.
    (conflict / "params.yaml").write_text("n: 3\n")
    git(conflict, "add", "params.yaml", "report")
    git(conflict, "checkout", "--ours", "dvc.lock")
    dvc(conflict, "repro", "-q")
    git(conflict, "add", "dvc.lock", "params.yaml", "report")
    git(conflict, "commit", "-q", "-m", "merged")
    assert "up to date" in dvc(conflict, "status")


def test_params_with_conflict_markers_are_named(conflict):
    done = CliRunner().invoke(app, ["estimate"])
    assert done.exit_code == BadConfig.exit_code
    assert "params.yaml has conflict markers of an unresolved merge: choose the lines" in done.output
