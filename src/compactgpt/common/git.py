"""Run git, and return the uncommitted changes of a work tree."""

import os
import subprocess
from pathlib import Path

from compactgpt.common.errors import MissingInput, UserError, printable

DIFF = "uncommitted.diff"  # the MLflow artifact with the uncommitted changes
_OUTPUTS = ("dvc.lock", "reports")  # stages write these, so their changes are not logged
_FOLDERS = ("conf", "src", "stages")  # untracked files are logged only from these folders
# Untracked files with other suffixes are not logged, since they may be keys or databases.
_SUFFIXES = {
    ".cfg", ".css", ".csv", ".html", ".in", ".ini", ".j2", ".json", ".lock", ".md", ".py", ".pyi", ".sh",
    ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
_MAX_BYTES = 1_000_000  # the largest diff that is logged with an MLflow run


def run_git(root: Path, *words: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    """Run git in a folder and return what it prints; raises UserError if its exit code is not `allowed`."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise MissingInput("git is not installed: install it, then run the same command again") from error
    if done.returncode not in allowed:
        reason = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise UserError(f"git {words[0]} failed: {reason}")
    return done.stdout


def git_text(root: Path, *words: str) -> str:
    """Run git and return its output as text without surrounding white space."""
    return run_git(root, *words).decode().strip()


def require_repository(root: Path) -> None:
    """Raise MissingInput if a folder is not in a git repository with a commit."""
    try:
        run_git(root, "rev-parse", "--verify", "HEAD")
    except MissingInput:
        raise
    except UserError as error:
        reason = " ".join(str(error).split())  # as one line
        advice = 'run `git init && git add . && git commit -m "first commit"`'
        raise MissingInput(f"this folder has no git repository with a commit: {advice} ({reason})") from error


def git_facts(root: Path) -> dict[str, str]:
    """Return MLflow tags: the commit, and whether there are uncommitted changes. Empty if git fails."""
    try:
        commit = git_text(root, "rev-parse", "HEAD")
        diff, left_out = uncommitted_changes(root)
    except UserError:
        return {}
    dirty = str(bool(diff or left_out)).lower()
    tags = {"git.commit": commit, "git.dirty": dirty, "mlflow.source.git.commit": commit}
    return tags | ({"git.left_out": "; ".join(left_out)} if left_out else {})


def uncommitted_changes(root: Path) -> tuple[bytes, list[str]]:
    """Return a diff of the uncommitted changes, and a line for each change that the diff leaves out."""
    options = ["--binary", "--no-ext-diff", "--no-textconv"]
    outputs = [f":(exclude){path}" for path in _OUTPUTS]
    diff, left_out = run_git(root, "diff", *options, "HEAD", "--", ".", *outputs), []
    if len(diff) > _MAX_BYTES:
        left_out.append(f"changes to tracked files ({len(diff):,} bytes)")
        diff = b""
    listed = run_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_FOLDERS)
    for name in sorted(filter(None, os.fsdecode(listed).split("\0"))):
        if reason := _reason_to_leave_out(root / name, name, _MAX_BYTES - len(diff)):
            left_out.append(f"{printable(name)} ({reason})")
        else:
            words = ["diff", *options, "--no-index", "--", os.devnull, name]
            diff += run_git(root, *words, allowed=(0, 1))  # exit code 1 only says that the files differ
    return diff, left_out


def _reason_to_leave_out(path: Path, name: str, limit: int) -> str:
    if any(part.startswith(".") for part in Path(name).parts):
        return "hidden"
    if path.suffix not in _SUFFIXES or path.is_symlink() or not path.is_file():
        return "not a kind of file that is logged"
    size = path.stat().st_size
    return f"{size:,} bytes" if size > limit else ""


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read, whatever the umask is."""
    path.unlink(missing_ok=True)  # an existing file would keep its permissions
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
