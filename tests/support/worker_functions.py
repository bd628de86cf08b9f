"""What worker processes run in tests: each imports this module alone."""

import os
import time
from pathlib import Path

from compactgpt.common.errors import BadData


def square(number: int) -> int:
    """The square of a number; 13 is a mistake, and 99 the death of the process."""
    if number == 13:
        raise BadData("thirteen is refused")
    if number == 99:
        os._exit(1)
    return number * number


def wait_first_time(task: tuple[Path, int]) -> int:
    """Write the process id and wait to be killed, once, for one of the tasks."""
    folder, number = task
    pid_file = folder / f"{number}.pid"
    if number == 2 and not pid_file.exists():
        pid_file.write_text(str(os.getpid()))
        time.sleep(60)
    return number * number
