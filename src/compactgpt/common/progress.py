"""What long work tells the person who waits for it: rooms call, the door draws."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called now and then with the work done so far, out of `total`, and figures worth a look."""

    def __call__(self, done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
        """Show that `done` of `total` units are finished; `figures` are short, already formatted."""


def silent(done: int, total: int, figures: Mapping[str, str] | None = None) -> None:
    """Tell nobody: the default of every room."""
