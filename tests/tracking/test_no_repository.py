"""Without a git repository (an unpacked ZIP), every command that needs one says how to create it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import MissingInput
from tests.support import tracking_store

ROOT = Path(__file__).parents[2]
ADVICE = "`git init && git add . && git commit"


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    for name in ("Makefile", "params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command", ["reproduce HEAD", "diff HEAD", "gate --against HEAD", "experiment run ci"]
)
def test_a_command_that_needs_git_says_how_to_create_a_repository(unpacked, command):
    before = (unpacked / "params.yaml").read_text()
    for _ in range(2):  # no repository, then one without a commit
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == MissingInput.exit_code, done.output
        *_, error = done.output.splitlines()  # `experiment run` prints the expected time before
        assert error.startswith("error: ")
        assert ADVICE in error
        tracking_store.git(unpacked, "init", "-q")
    assert (unpacked / "params.yaml").read_text() == before


@pytest.mark.parametrize("target", ["repro", "run", "push"])
def test_a_target_that_needs_git_says_so_before_the_set_up(unpacked, target):
    environment = {**os.environ, "EXPERIMENT": "ci"}
    done = subprocess.run(["make", target], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, ADVICE in done.stdout) == (2, True)
    assert not (unpacked / ".venv").exists()


@pytest.mark.parametrize("command", ["estimate", "experiment list", "repair"])
def test_a_command_that_does_not_need_git_works_without(unpacked, command):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
