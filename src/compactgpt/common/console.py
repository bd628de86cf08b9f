"""What a person at the keyboard sees: progress, and a mistake as one sentence and an exit code."""

import errno
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from compactgpt.common.errors import (
    BadData,
    DiskFailed,
    DiskFull,
    MissingInput,
    NotAllowed,
    OutOfMemory,
    UserError,
    printable,
)
from compactgpt.common.torchrun import dist_info, under_torchrun


class Progress(Protocol):
    """Called now and then during long work: `done` units of `total`, and a few formatted figures."""

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished."""


def silent(done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
    """Show nothing: the default `progress` of every function that has one."""


class ProgressBar:
    """Progress on stderr: a live bar on a terminal, now and then a plain line elsewhere."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self._bar: Any = None
        self._next_line = 0.0

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished."""
        if sys.stderr.isatty():
            self._draw(done, total, figures)
        elif time.monotonic() >= self._next_line or done == total:
            self._next_line = time.monotonic() + 15
            extra = "".join(f", {key} {value}" for key, value in (figures or {}).items())
            report(f"{self.name}: {done:,} of {total:,} {self.unit}{extra}")

    def _draw(self, done: int, total: int, figures: Mapping[str, str] | None) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=printable(self.name), unit=f" {self.unit}", unit_scale=True)
        self._bar.total = total
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None


@contextmanager
def handle_user_errors(stopped: str = "stopped") -> Iterator[None]:
    """Turn a mistake into one sentence and an exit code.

    Args:
        stopped: what ctrl-C is answered with.
    """
    try:
        yield
    except UserError as error:
        # What every process meets at the same step is told once.
        if dist_info().is_main_process or isinstance(error, BadData | DiskFull | MissingInput | OutOfMemory):
            say(str(error))
        if under_torchrun():  # it ends who is left: already on the way
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(error.exit_code) from error
    except OSError as error:  # of what is not written through compactgpt.storage, such as journals
        if not (told := _misfortune(error)):
            raise
        say(str(told))
        raise SystemExit(told.exit_code) from error
    except ModuleNotFoundError as error:
        if not (extra := extra_with(error.name or "")):
            raise
        say(f"this needs {error.name}, which is not installed: pip install 'compactgpt[{extra}]'")
        raise SystemExit(MissingInput.exit_code) from error
    except KeyboardInterrupt as error:
        say(stopped)
        raise SystemExit(130) from error


def _misfortune(error: OSError) -> UserError | None:
    """What a person can mend of what the system refused."""
    place = error.filename or Path.cwd()
    if error.errno == errno.EIO:
        return DiskFailed(f"the disk failed ({place}): see to it, then run again")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(f"no room left on the disk ({place}): free some space and run again")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        why = f"{error.filename}: {error.strerror}"
        return NotAllowed(f"{why}: run in a folder where you may read and write, or mend its permissions")
    return None


def extra_with(module: str) -> str:
    """The extra of this package that brings a module, as its own metadata says; empty if none does."""
    from importlib.metadata import PackageNotFoundError, requires  # 50 ms: only when something is missing

    wanted = module.partition(".")[0].replace("_", "-")
    with suppress(PackageNotFoundError):
        for line in requires("compactgpt") or []:
            name = re.match(r"[\w.-]+", line)
            extra = re.search(r"extra == ['\"](\w+)['\"]", line)
            if name and extra and name[0].replace("_", "-") == wanted:
                return extra[1]
    return ""


def say(message: str) -> None:
    """Print a mistake to stderr."""
    report(f"error: {message}")


def report(message: str) -> None:
    """Print a message to stderr, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), file=sys.stderr, flush=True)


def echo(message: str) -> None:
    """Print a result to stdout, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), flush=True)
