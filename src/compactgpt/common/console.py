"""Print progress, results and messages; turn a user's mistake into one sentence and an exit code."""

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
    DiskFull,
    MissingInput,
    OutOfMemory,
    UserError,
    printable,
    user_error_of,
)
from compactgpt.common.torchrun import dist_info, under_torchrun


class Progress(Protocol):
    """A function that long work calls repeatedly to report its progress, with a few formatted figures."""

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished."""


def silent(done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
    """Show no progress. Functions with an argument `progress` use this function by default."""


class ProgressBar:
    """Show progress on stderr: a progress bar on a terminal, otherwise a line every 15 seconds."""

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
    """Print a user's mistake as one sentence on stderr; exit with its exit code. Ctrl-C prints `stopped`."""
    try:
        yield
    except UserError as error:
        # If several processes make the same mistake at the same step, only the main process prints it.
        if dist_info().is_main_process or isinstance(error, BadData | DiskFull | MissingInput | OutOfMemory):
            report(f"error: {error}")
        if under_torchrun():  # torchrun sends SIGTERM to the other processes, and to this one while it exits
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(error.exit_code) from error
    except OSError as error:  # an error of a file that common.storage does not write, such as a journal
        user_error = user_error_of(error, Path.cwd())
        if user_error is None:
            raise
        report(f"error: {user_error}")
        raise SystemExit(user_error.exit_code) from error
    except ModuleNotFoundError as error:
        extra = extra_with(error.name or "")
        if not extra:
            raise
        report(f"error: this needs {error.name}, which is not installed: pip install 'compactgpt[{extra}]'")
        raise SystemExit(MissingInput.exit_code) from error
    except KeyboardInterrupt as error:
        report(f"error: {stopped}")
        raise SystemExit(130) from error


def extra_with(module: str) -> str:
    """Return the extra (a group of optional dependencies) that installs a module; empty if no extra does."""
    from importlib.metadata import PackageNotFoundError, requires  # takes 50 ms, and is rarely needed

    wanted = module.partition(".")[0].replace("_", "-")
    with suppress(PackageNotFoundError):
        for line in requires("compactgpt") or []:
            name = re.match(r"[\w.-]+", line)
            extra = re.search(r"extra == ['\"](\w+)['\"]", line)
            if name and extra and name[0].replace("_", "-") == wanted:
                return extra[1]
    return ""


def report(message: str) -> None:
    """Print a message to stderr, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), file=sys.stderr, flush=True)


def echo(message: str, end: str = "\n") -> None:
    """Print a result to stdout, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), end=end, flush=True)
