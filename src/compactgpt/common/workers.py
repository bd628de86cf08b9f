"""Call a function for many tasks in several processes."""

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

    `function` must be picklable: not a lambda or a nested function. Raises Busy if a worker was killed.
    """
    if num_workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # `fork` may hang if this process has threads
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    running: deque[Future[R]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(function, task))
            # Two tasks per worker keep all workers busy. More results could fill the memory.
            if len(running) == 2 * num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise Busy(
            "a worker process was killed, most often because memory ran out: "
            "lower runtime.num_workers in params.yaml, then run the command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_after_parent() -> None:
        wait([parent.sentinel])  # returns when the parent process ends, even by SIGKILL
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()
