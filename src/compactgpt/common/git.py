"""Facts about a git work tree: commit, uncommitted changes, refs."""

import subprocess
from pathlib import Path

OUTPUTS = ("dvc.lock", "reports")  # written by stages, so a change there is no change of the code
DIFF = "uncommitted.diff"  # file name of the uncommitted changes that a run keeps
NEW_FILES = ("conf", "src", "stages")


def git_facts(folder: Path) -> dict[str, str]:
    """Return commit and cleanness of the work tree at `folder`; empty without one.

    Changes to OUTPUTS don't count.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
        dirty = bool(uncommitted(folder))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def uncommitted(folder: Path) -> bytes:
    """Return the patch that turns the commit into the work tree (`git apply`); empty where that is clean.

    New files are part of it only in NEW_FILES, where code and settings are: notes and keys are not read.
    """
    outputs = [f":(exclude){path}" for path in OUTPUTS]
    changes = _git(folder, "diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".", *outputs)
    new = _git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", *NEW_FILES)
    for name in sorted(filter(None, new.decode().split("\0"))):
        words = ["diff", "--binary", "--no-ext-diff", "--no-index", "--", "/dev/null", name]
        changes += _git(folder, *words, allowed=(0, 1))  # 1: they differ
    return changes


def _git(folder: Path, *words: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, words[0], done.stdout, done.stderr)
    return done.stdout
