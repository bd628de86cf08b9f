"""Small DVC projects for tests, with the real `dvc` and `git`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "a@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}  # fmt: skip


def run(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder. With `check`, fail the test if the command fails."""
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def git(folder: Path, *words: str) -> str:
    return run(folder, "git", *words).stdout


def dvc(folder: Path, *words: str) -> str:
    return run(folder, "dvc", *words).stdout


def git_repository(folder: Path, stages: dict[str, Any], **other: Any) -> Path:
    """Create a git repository with DVC and a dvc.yaml of these stages, without a commit."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    dvc(folder, "init", "-q")
    YAML().dump({"stages": stages, **other}, folder / "dvc.yaml")
    return folder
