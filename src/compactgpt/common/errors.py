"""Errors that a user can correct, each with its exit code. Any other exception is a bug of this project."""

import unicodedata

# Unicode's categories of control, format, surrogate, line separator and paragraph separator.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control and invisible characters as escapes; the characters in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(
        ascii(character)[1:-1]
        if character not in keep and unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in text
    )


class UserError(Exception):
    """An error that the user can correct. The message says what to do."""

    exit_code = 1  # exit codes from 65 to 78 are those of sysexits.h


class CheckFailed(UserError):
    """A check failed, such as the gate or the validation of the data."""

    exit_code = 3


class BadData(UserError):
    """A file is empty, incomplete, altered, or has the wrong format."""

    exit_code = 65


class OutsideFolder(BadData):
    """A path leads out of the folder that must contain it."""


class MissingInput(UserError):
    """A file, folder or program that the command needs does not exist."""

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
    """Another process does the same work now, or a signal stopped this process."""

    exit_code = 75


class PeerLost(Busy):
    """Another process of the distributed training has ended or does not answer."""


class NotAllowed(UserError):
    """A path can't be read or written, or a command refuses to replace files of the user."""

    exit_code = 77


class BadConfig(UserError):
    """A key of params.yaml is unknown, or its value is not allowed."""

    exit_code = 78


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 79
