"""Mistakes and misfortunes that a person can mend, each with the exit code that scripts can act on.

A stage prints the message of a `UserError` as its one sentence and leaves with `exit_code`; anything
else that is raised is a bug of ours. The codes follow sysexits.h where it has one.
"""

import unicodedata

# Control, format (bidirectional ones too), surrogate (bytes that are not UTF-8), line, paragraph separator.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "") -> str:
    """Return `text` with every character that a terminal would obey or hide written as an escape.

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
    """Something the user can mend: the message says what was found, what is allowed, what to do."""

    exit_code = 1


class CheckFailed(UserError):
    """A check of the project did its work and said no (an expectation, a gate)."""

    exit_code = 3


class BadData(UserError):
    """A file is not what it must be: empty, cut short, altered, not UTF-8, of another version."""

    exit_code = 65


class OutsideFolder(BadData):
    """A path from a lock file, a manifest or a diff leads out of the folder that it belongs to."""


class MissingInput(UserError):
    """A file or folder that a stage reads is not there."""

    exit_code = 66


class Unreachable(UserError):
    """A hub, a package index or a server did not answer."""

    exit_code = 69


class OutOfMemory(UserError):
    """No memory left for the work as it is configured."""

    exit_code = 71


class DiskFull(UserError):
    """No room left to write."""

    exit_code = 73


class DiskFailed(UserError):
    """The disk, or the way to it, refused to read or write."""

    exit_code = 74


class Busy(UserError):
    """Another process does this work right now, or this one was asked to stop: run it again later."""

    exit_code = 75


class PeerLost(Busy):
    """Another process of a common training died or fell silent: torchrun starts all of them again."""


class NotAllowed(UserError):
    """This user may not read or write there, or nobody may: a folder that is read-only."""

    exit_code = 77


class BadConfig(UserError):
    """A key of params.yaml is unknown, of the wrong type, or impossible."""

    exit_code = 78


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 79
