"""Errors that a user can act on, each with an exit code that scripts can test.

A stage or command prints the message of a `UserError` as one sentence, and exits with its `exit_code`. Any
other exception is a bug of this project. Exit codes are taken from sysexits.h where it has a suitable code.
"""

import unicodedata

# Unicode categories: control, format (also marks for the direction of text), surrogate (which stands for a
# byte that is not UTF-8), line separator, paragraph separator.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control and invisible characters as escapes, except the characters in `keep`."""
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
    """A check of the project failed, such as an expectation about the data or the gate."""

    exit_code = 3


class BadData(UserError):
    """A file is not valid: it is empty, cut short, altered, not UTF-8, or of another format."""

    exit_code = 65


class OutsideFolder(BadData):
    """A path in dvc.lock, a manifest or a git diff leads out of the folder that must contain it."""


class MissingInput(UserError):
    """A file or folder that a stage reads does not exist."""

    exit_code = 66


class Unreachable(UserError):
    """The Hugging Face Hub, a package index or another server did not answer."""

    exit_code = 69


class OutOfMemory(UserError):
    """The work needs more memory than this machine has."""

    exit_code = 71


class DiskFull(UserError):
    """The disk has no space left to write."""

    exit_code = 73


class DiskFailed(UserError):
    """The disk, or the connection to it, failed to read or write."""

    exit_code = 74


class Busy(UserError):
    """Another process does this work now, or this process was asked to stop: run the command again later."""

    exit_code = 75


class PeerLost(Busy):
    """Another process of a distributed training ended or does not answer."""


class NotAllowed(UserError):
    """The user has no permission to read or write a path, or a command refuses to replace user files."""

    exit_code = 77


class BadConfig(UserError):
    """A key of params.yaml is unknown, or its value has the wrong type or is not allowed."""

    exit_code = 78


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 79
