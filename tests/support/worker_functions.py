"""What worker processes run in tests: each imports this module alone."""

import os

from compactgpt.common.errors import BadData


def square(number: int) -> int:
    """The square of a number; 13 is a mistake, and 99 the death of the process."""
    if number == 13:
        raise BadData("thirteen is refused")
    if number == 99:
        os._exit(1)
    return number * number
