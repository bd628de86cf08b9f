"""What git knows of the working tree: the commit, and the changes that are not committed."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from compactgpt.common.errors import MissingInput

DIFF = "uncommitted.diff"  # name of the artifact
OUTPUTS = ("dvc.lock", "reports")  # what stages write and git keeps: never a change of the user's
NEW_FILES = ("conf", "src", "stages")  # folders whose new files are part of the changes
# Code, settings and templates. Anything else there (a key, a database, an archive) does not belong in a log.
NEW_SUFFIXES = {
    ".cfg", ".css", ".csv", ".html", ".in", ".ini", ".j2", ".json", ".lock", ".md", ".py", ".pyi", ".sh",
    ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
MAX_BYTES = 1_000_000  # of all changes together
_MARKER = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)


@dataclass(frozen=True)
class Changes:
    """The difference between the commit and the working tree, as far as it may be logged."""

    diff: bytes = b""  # for `git apply`
    left_out: list[str] = field(default_factory=list)  # new files, and why each is not part of `diff`

    def __bool__(self) -> bool:
        return bool(self.diff or self.left_out)


def git_facts(root: Path) -> dict[str, str]:
    """Return the tags of a run that name the commit and whether the working tree is clean; empty without git.

    Changes to OUTPUTS do not count. `git.left_out` names changes that are too large, or of no kind to log.
    """
    try:
        commit = run_git(root, "rev-parse", "HEAD").decode().strip()
        changes = uncommitted_changes(root)
    except (OSError, subprocess.CalledProcessError):
        return {}
    left_out = {"git.left_out": "; ".join(changes.left_out)} if changes.left_out else {}
    dirty = str(bool(changes)).lower()
    return {"git.commit": commit, "git.dirty": dirty, "mlflow.source.git.commit": commit, **left_out}


def uncommitted(root: Path) -> bytes:
    """Return what `git apply` needs to turn the commit into the working tree: see `uncommitted_changes`."""
    return uncommitted_changes(root).diff


def uncommitted_changes(root: Path) -> Changes:
    """Return the changes that `git apply` needs to turn the commit into the working tree.

    A new file is part of it only in the folders NEW_FILES, with a suffix in NEW_SUFFIXES, not hidden, and as
    long as all changes together have at most MAX_BYTES. Larger changes to tracked files are left out as a
    whole: a part of them would not apply.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or no commit.
    """
    outputs = [f":(exclude){path}" for path in OUTPUTS]
    words = ["diff", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".", *outputs]
    diff, left_out = run_git(root, *words), []
    if len(diff) > MAX_BYTES:
        left_out.append(f"changes to tracked files ({len(diff):,} bytes)")
        diff = b""
    for name in _new_files(root):
        if reason := _reason_to_leave_out(root / name, Path(name), MAX_BYTES - len(diff)):
            left_out.append(f"{name} ({reason})")
            continue
        words = ["diff", "--binary", "--no-ext-diff", "--no-index", "--", "/dev/null", name]
        diff += run_git(root, *words, allowed=(0, 1))  # 1: the two differ
    return Changes(diff, left_out)


def _new_files(root: Path) -> list[str]:
    listed = run_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *NEW_FILES)
    return sorted(filter(None, os.fsdecode(listed).split("\0")))


def _reason_to_leave_out(path: Path, name: Path, limit: int) -> str:
    if any(part.startswith(".") for part in name.parts):
        return "hidden"
    if path.suffix not in NEW_SUFFIXES or path.is_symlink() or not path.is_file():
        return "not a kind of file that is logged"
    if (size := path.stat().st_size) > limit:
        return f"{size:,} bytes"
    return ""


def require_repository(root: Path) -> None:
    """Check that a folder is in a git repository with a commit.

    Raises:
        MissingInput: it is not, or git is not installed.
    """
    if not shutil.which("git"):
        raise MissingInput("git is not installed: install it, then run the same command again")
    command = ["git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout:
        return
    if "dubious ownership" in done.stderr:
        raise MissingInput(f"git refuses this folder, which belongs to another user: {done.stderr.strip()}")
    raise MissingInput(
        "this folder is not a git repository with a commit (an unpacked ZIP has none): run "
        '`git init && git add . && git commit -m "first commit"`, then the same command again'
    )


def conflict_in(name: str, content: bytes) -> str:
    """Return a sentence about a file that has the markers of an unresolved merge, empty where it has none."""
    if not _MARKER.search(content):  # one is enough: the user may have removed the others already
        return ""
    found = f"{name} has conflict markers of an unresolved merge"
    if name != "dvc.lock":
        return f"{found}: choose the lines in an editor, then `git add {name}`"
    return (
        f"{found}: keep one side (`git checkout --ours dvc.lock`, or `--theirs`), then `dvc repro` runs what "
        "differs and `git add dvc.lock` ends the conflict"
    )


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, whatever the umask says."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "wb") as file:
        os.fchmod(handle, 0o600)  # of a file that was there before, too
        file.write(content)


def run_git(root: Path, *words: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    """Run git in a folder and return what it prints.

    Raises:
        OSError: there is no git.
        subprocess.CalledProcessError: git failed with an exit code that is not in `allowed`.
    """
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, words[0], done.stdout, done.stderr)
    return done.stdout
