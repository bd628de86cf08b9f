"""One function over many tasks in several processes: results in order, bounded memory, no orphans."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from compactgpt.common.errors import Busy

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], tasks: Iterable[T], num_workers: int) -> Iterator[R]:
    """Yield `function(task)` for each task, in the order of the tasks.

    Args:
        function: importable by name; its argument and result can be pickled.
        tasks: taken one by one; at most 2 x `num_workers` of them run or wait.
        num_workers: processes; with 1 this process does the work.

    Raises:
        Busy: a worker was killed.
        Exception: whatever `function` raises, for the first task that raises.
    """
    if num_workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    running: deque[Future[R]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(function, task))
            # Enough for no worker to wait; more results would fill the memory of this process.
            if len(running) == 2 * num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise Busy(
            "a worker process was killed, most often because memory ran out: "
            "lower runtime.num_workers in params.yaml, or free some memory, and run the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        wait([parent.sentinel])  # readable when the parent has ended, for whatever reason
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()
