"""Print progress, results and error messages."""

import errno
import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from compactgpt.common.device import dist_info, under_torchrun
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


class Progress(Protocol):
    """The type of a function that shows how much of a long computation is done."""

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished. Also show `figures`, which maps names to values."""


def silent(done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
    """Show nothing. This function is the default value of arguments named `progress`."""


class ProgressBar:
    """A progress bar on a terminal, or else a line on stderr every 15 seconds."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self._bar: Any = None
        self._next_line = 0.0
        self._start: tuple[float, int] | None = None  # time in seconds and `done` at the first call

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished. Also show `figures`, which maps names to values."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        if sys.stderr.isatty():
            self._draw(done, total, figures)
        elif now >= self._next_line or done == total:
            self._next_line = now + 15
            amount = f"{done:,} of {total:,}" if total else f"{done:,}"  # 0: unknown total
            extra = "".join(f", {key} {value}" for key, value in (figures or {}).items())
            start, first = self._start
            if first < done < total:
                seconds = round((now - start) / (done - first) * (total - done))
                extra += f", left {seconds // 60}:{seconds % 60:02d}"
            report(f"{self.name}: {amount} {self.unit}{extra}")
        if done == total:
            self._start = None

    def _draw(self, done: int, total: int, figures: Mapping[str, str] | None) -> None:
        if self._bar is None:
            from tqdm import tqdm

            is_large = total == 0 or total >= 10**6  # show 20.1M, but 1000 rather than 1.00k
            # tqdm would show nothing in a terminal without a size, for which shutil returns 80 x 24.
            columns, rows = shutil.get_terminal_size()
            self._bar = tqdm(
                total=total,
                desc=printable(self.name),
                unit=f" {self.unit}",
                unit_scale=is_large,
                ncols=columns,
                nrows=rows,
            )
        self._bar.total = total
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None


@contextmanager
def handle_user_errors(stopped: str = "stopped") -> Iterator[None]:
    """Print a UserError as one sentence, and exit with its code. On Ctrl-C, print the message `stopped`."""
    try:
        yield
    except KeyboardInterrupt as error:
        report(f"error: {stopped}")
        raise SystemExit(130) from error
    except Exception as error:
        user_error = _user_error_of(error)
        if user_error is None:  # a bug, which needs its traceback
            raise
        # Most errors occur in all processes, so only the main process prints them. Errors of the types below
        # can occur in a single process, so every process prints them.
        single_process_errors = BadData | DiskFull | MissingInput | OutOfMemory
        if dist_info().is_main_process or isinstance(user_error, single_process_errors):
            report(f"error: {user_error}")
        # Ignore SIGTERM to keep this exit code: torchrun sends SIGTERM to all processes if one fails.
        if under_torchrun():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(user_error.exit_code) from error


def _user_error_of(error: Exception) -> UserError | None:
    """Return an exception as a `UserError`, or None if it is a bug of this project."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error.name or "")):
        return MissingInput(f"{error.name} is not installed: run `pip install 'compactgpt[{extra}]'`")
    if isinstance(error, OSError):
        name = error.filename or Path.cwd()
        if error.errno == errno.EIO:
            return DiskFailed(f"the disk failed ({name}): check the disk, then run the command again")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFull(f"no space left on the disk ({name}): free space, then run the command again")
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "run in a folder where you may read and write, or change its permissions"
            return NotAllowed(f"{name}: {error.strerror}: {advice}")
    return None


def _extra_with(module: str) -> str:
    """Return the extra of this package that installs `module`; if no extra does, an empty string."""
    from importlib import metadata  # this import takes 50 ms, and only an error message needs it

    package = module.partition(".")[0].replace("_", "-")
    with suppress(metadata.PackageNotFoundError):  # raised if this package is not installed
        for line in metadata.requires("compactgpt") or []:
            # Example: `dvc>=3.67; extra == "pipeline"`. The module `dvc` must not match `dvc-s3`.
            found = re.match(rf"{package}(?![\w.-]).*extra == ['\"](\w+)['\"]", line.replace("_", "-"))
            if found:
                return found[1]
    return ""


def report(message: str) -> None:
    """Print a message to stderr, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), file=sys.stderr, flush=True)


def echo(message: str, end: str = "\n") -> None:
    """Print a result to stdout, with control characters written as escapes."""
    print(printable(message, keep="\n\t"), end=end, flush=True)


def echo_json(value: Any) -> None:
    """Print a result to stdout as JSON. Infinite numbers and NaN become null, because JSON has neither."""
    echo(json.dumps(_only_finite(value), indent=2, allow_nan=False))


def _only_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _only_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_only_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
