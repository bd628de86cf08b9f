"""A folder for a git worktree and what runs in it, of which nothing is left, however this process ends.

A watchdog process reads from a pipe that only this process writes to. The pipe closes when this process ends,
also by SIGKILL: then the watchdog kills the command that still runs, and removes the worktree and the folder.
It runs this file as a script, so only the standard library may be imported here.
"""

import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_LOCK, _KEPT = "lock", "kept"  # files: held by the owner while it lives; the folder stays
_SECONDS_TO_END = 10.0  # for killed processes, which may still write


@dataclass(frozen=True)
class Scratch:
    """A folder for one use."""

    folder: Path
    _watchdog: subprocess.Popen[bytes]

    @property
    def tree(self) -> Path:
        """Where the worktree goes."""
        return self.folder / "tree"

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command in the worktree, and kill it with all that it started if this process ends first.

        Returns:
            The exit code.
        """
        child = subprocess.Popen(
            [sys.executable, "-P", __file__, "run", str(os.getpid()), *words],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is for the result
            start_new_session=True,  # its process group can be killed as one
        )
        self._tell(child.pid)
        exit_code = child.wait()
        with suppress(ProcessLookupError):  # what it left running
            os.killpg(child.pid, signal.SIGKILL)
        self._tell(0)
        return exit_code

    def _tell(self, group: int) -> None:
        assert self._watchdog.stdin is not None
        with suppress(BrokenPipeError):  # somebody killed the watchdog: `scratch_worktree` removes the folder
            self._watchdog.stdin.write(f"{group}\n".encode())


@contextmanager
def scratch_worktree(root: Path, folders: Path, *, keep: bool = False) -> Iterator[Scratch]:
    """Create a folder for a worktree, and remove both at the end.

    Folders that earlier processes left, because their watchdog was killed too, are removed first.

    Args:
        root: the repository.
        folders: holds a folder for each process.
        keep: leave the folder and the worktree.
    """
    folders.mkdir(parents=True, exist_ok=True)
    folder = folders / f"{os.getpid()}-{secrets.token_hex(3)}"
    with ExitStack() as stack:
        # One process at a time looks for free locks, so that none finds a folder whose lock is not held yet.
        with open(folders.with_suffix(".lock"), "w", encoding="utf-8") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            remove_abandoned(root, folders)
            folder.mkdir(mode=0o700)
            lock = stack.enter_context(open(folder / _LOCK, "w", encoding="utf-8"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if keep:
            (folder / _KEPT).touch()
        watchdog = subprocess.Popen(
            [sys.executable, "-P", __file__, str(root), str(folder)],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # ctrl-C in the terminal does not reach it
        )
        try:
            yield Scratch(folder, watchdog)
        finally:
            assert watchdog.stdin is not None
            watchdog.stdin.close()
            if watchdog.wait() and not keep:
                _remove(root, folder)


def remove_abandoned(root: Path, folders: Path) -> None:
    """Remove the folders whose process has ended, except those that it was asked to keep."""
    for folder in folders.iterdir():
        with suppress(OSError), open(folder / _LOCK, "r+", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / _KEPT).exists():
                _remove(root, folder)


def _remove(root: Path, folder: Path) -> None:
    words = ["git", "-C", str(root), "worktree"]
    removal = [*words, "remove", "--force", "--force", str(folder / "tree")]
    subprocess.run(removal, check=False, capture_output=True)  # git may know it no more
    deadline = time.monotonic() + _SECONDS_TO_END
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
    _forget(root, folder / "tree")


def _forget(root: Path, tree: Path) -> None:
    """Delete git's record of a worktree that is gone; `git worktree prune` forgets the user's own too."""
    words = ["git", "-C", str(root), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    with suppress(OSError):
        for record in Path(done.stdout.strip()).glob("worktrees/*/gitdir"):
            if not tree.exists() and Path(record.read_text().strip()) == tree.absolute() / ".git":
                shutil.rmtree(record.parent, ignore_errors=True)


def _watch(root: Path, folder: Path) -> None:
    """Wait for the end of the process that writes to stdin: the process group of its command, 0 for none."""
    group = 0
    for line in sys.stdin:
        group = int(line)
    if group:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    if not (folder / _KEPT).exists():
        _remove(root, folder)


def _run(parent: int, words: list[str]) -> None:
    """Become a command that is killed with its parent: it may die before the watchdog knows the group."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() == parent:
        os.execvp(words[0], words)  # noqa: S606 (no shell)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _run(int(sys.argv[2]), sys.argv[3:])
    else:
        _watch(Path(sys.argv[1]), Path(sys.argv[2]))
