"""Errors that a user can act on, each with the exit code that scripts can test.

A stage or command prints the message of a `UserError` as one sentence and exits with `exit_code`; any other
exception is a bug of this project. The codes follow sysexits.h where it has one.
"""

import errno
import unicodedata
from pathlib import Path

# Control, format (bidirectional ones too), surrogate (bytes that are not UTF-8), line, paragraph separator.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters and invisible characters escaped, safe to print.

    Args:
        text: a file name, a message, or any other text from outside.
        keep: characters that are left as they are, such as a message's own line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        ascii(character)[1:-1]
        if character not in keep and unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in text
    )


class UserError(Exception):
    """An error that the user can act on: the message states what was found, what is allowed, what to do."""

    exit_code = 1


class CheckFailed(UserError):
    """A check of the project ran and failed (an expectation, the gate)."""

    exit_code = 3


class BadData(UserError):
    """A file is not as it must be: empty, cut short, altered, not UTF-8, of another version."""

    exit_code = 65


class OutsideFolder(BadData):
    """A path in a lock file, a manifest or a diff is outside of the folder that it belongs to."""


class MissingInput(UserError):
    """A file or folder that a stage reads does not exist."""

    exit_code = 66


class Unreachable(UserError):
    """A hub, a package index or a server did not answer."""

    exit_code = 69


class OutOfMemory(UserError):
    """The work as it is configured needs more memory than there is."""

    exit_code = 71


class DiskFull(UserError):
    """The disk has no space left to write."""

    exit_code = 73


class DiskFailed(UserError):
    """The disk, or the connection to it, failed to read or write."""

    exit_code = 74


class Busy(UserError):
    """Another process does this work now, or this one was asked to stop: run it again later."""

    exit_code = 75


class PeerLost(Busy):
    """Another process of a distributed training stopped: torchrun starts all of them again."""


class NotAllowed(UserError):
    """The user may not read or write there, or the project refuses to, as for a folder with other files."""

    exit_code = 77


class BadConfig(UserError):
    """A key of params.yaml is unknown, of the wrong type, or impossible."""

    exit_code = 78


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 79


def user_error_of(error: OSError, path: Path) -> UserError | None:
    """Return an error of the system as one that the user can act on; None if it is a bug of this project.

    Args:
        error: any; its own file name, if it has one, goes before `path`.
        path: what was read or written.
    """
    place = error.filename or path
    if error.errno == errno.EIO:
        return DiskFailed(f"the disk failed ({place}): check it, then run again")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(f"no space left on the disk ({place}): free some space and run again")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "run in a folder where you may read and write, or change its permissions"
        return NotAllowed(f"{place}: {error.strerror}: {advice}")
    return None
