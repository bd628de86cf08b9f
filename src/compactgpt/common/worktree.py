"""A temporary folder for a checkout and the commands that run in it; nothing is left, however we end.

A watchdog process starts the commands. It reads from a pipe that only this process writes to. The pipe closes
when this process ends, also by SIGKILL: then the watchdog kills the command that still runs, and removes the
folder. It runs this file as a script, so only the standard library may be imported here.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_SECONDS_TO_END = 10.0  # for killed processes, which may still write


@dataclass(frozen=True)
class Scratch:
    """A folder for one use."""

    folder: Path
    watchdog: subprocess.Popen[str]

    @property
    def tree(self) -> Path:
        """The folder for the checkout."""
        return self.folder / "tree"

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command in the checkout. When it ends, the processes that it left running are killed.

        Returns:
            The command's exit code; -SIGKILL if the watchdog process was killed, and the command with it.
        """
        assert self.watchdog.stdin
        assert self.watchdog.stdout
        command = {"args": [*words], "cwd": str(self.tree), "env": dict(environment)}
        with suppress(BrokenPipeError):  # the watchdog was killed: it answers nothing
            self.watchdog.stdin.write(json.dumps(command) + "\n")
        group = self.watchdog.stdout.readline()
        exit_code = self.watchdog.stdout.readline()
        if group and not exit_code:
            _kill_group(int(group))
        return int(exit_code or -signal.SIGKILL)


@contextmanager
def scratch_worktree(folders: Path, *, keep: bool = False) -> Iterator[Scratch]:
    """Create a temporary folder, and remove it at the end.

    Args:
        folders: holds a folder for each process.
        keep: leave the folder.
    """
    folders.mkdir(parents=True, exist_ok=True)
    folder = folders / f"{os.getpid()}-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o700)
    watchdog = subprocess.Popen(
        [sys.executable, "-P", __file__, "" if keep else str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,  # ctrl-C in the terminal does not reach it
    )
    try:
        yield Scratch(folder, watchdog)
    finally:
        watchdog.communicate()  # closes its stdin, and waits
        if watchdog.returncode and not keep:
            _remove(folder)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_END
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _watch(folder: str) -> None:
    """Run commands that come as lines of JSON. At the end of the input, kill the last, remove the folder."""
    child = None
    for line in sys.stdin:
        # stdout is for the answers. A session of its own makes all that the command starts one group.
        child = subprocess.Popen(
            **json.loads(line), stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
        )
        _answer(child.pid)
        threading.Thread(target=_report_end, args=(child,)).start()
    if child:
        _kill_group(child.pid)
    if folder:
        _remove(Path(folder))


def _report_end(child: subprocess.Popen[bytes]) -> None:
    exit_code = child.wait()
    _kill_group(child.pid)  # what it left running
    _answer(exit_code)


def _answer(number: int) -> None:
    with suppress(BrokenPipeError):  # its reader, the owner, was killed
        os.write(1, f"{number}\n".encode())


if __name__ == "__main__":
    _watch(sys.argv[1])
