"""Without a git repository (an unpacked ZIP), every command that needs one says how to make it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import MissingInput
from tests.support import tracking_store

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["reproduce", "HEAD"],
    ["reproduce", "HEAD", "--check"],
    ["diff", "HEAD"],
    ["gate", "--against", "HEAD"],
    ["experiment", "run", "ci"],
    ["experiment", "run", "ladder"],
    ["ladder"],
]


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    folder = tmp_path / "compactgpt-main"
    folder.mkdir()
    for name in ("Makefile", "params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "conf", folder / "conf")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_needs_git_says_how_to_make_a_repository(unpacked, words, monkeypatch):
    before = (unpacked / "params.yaml").read_text()
    for _ in range(2):  # no repository, then one without a commit
        done = CliRunner().invoke(app, words)
        assert done.exit_code == MissingInput.exit_code, done.output
        assert done.output.startswith("error: ")
        assert "`git init && git add . && git commit" in done.output
        assert done.output.count("\n") == 1
        tracking_store.git(unpacked, "init", "-q")
    assert (unpacked / "params.yaml").read_text() == before
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert "git is not installed" in CliRunner().invoke(app, words).output


@pytest.mark.parametrize("target", ["repro", "run", "ci", "push", "pull", "hooks"])
def test_a_target_that_needs_git_says_so_before_the_set_up(unpacked, target):
    environment = {**os.environ, "EXPERIMENT": "ci"}
    done = subprocess.run(["make", target], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "`git init && git add . && git commit" in done.stdout
    assert not (unpacked / ".venv").exists()


def test_what_does_not_need_git_works_without(unpacked):
    for words in (["estimate"], ["experiment", "list"], ["repair"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
