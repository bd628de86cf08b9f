"""Where the pieces of a stage are made: processes of this machine, or a Ray cluster.

Both call the same function on the same tasks and give the results in the order of the tasks, so that
what comes out is the same. Ray is an extra (`pip install compactgpt[ray]`). A cluster's nodes must have
this package installed and see the same folders, since tasks name files.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from compactgpt.common.errors import BadConfig, Busy, Unreachable, UserError
from compactgpt.common.workers import ordered_map

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 5  # of a task whose worker died


def run_tasks(
    engine: Literal["local", "ray"], function: Callable[[T], R], tasks: Iterable[T], num_workers: int
) -> Iterator[R]:
    """Yield `function(task)` for each task, in the order of the tasks.

    Args:
        engine: local processes, or the Ray cluster at RAY_ADDRESS (a local one where that is not set).
        function: importable by name; what it takes and returns can be serialized.
        tasks: taken one by one; a bounded number of them is under way.
        num_workers: processes of the local engine, or of the local Ray cluster.

    Raises:
        BadConfig: Ray is asked for and not installed.
        Unreachable: there is no cluster at RAY_ADDRESS.
        Busy: workers were killed, more often than is worth trying.
        Exception: whatever `function` raises, for the first task that raises.
    """
    if engine == "local":
        return ordered_map(function, tasks, num_workers)
    return _ray_map(function, tasks, num_workers)


def _ray_map(function: Callable[[T], R], tasks: Iterable[T], num_workers: int) -> Iterator[R]:
    with _cluster(num_workers) as ray:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        running: deque[Any] = deque()
        for task in tasks:
            running.append(remote.remote(task))
            if len(running) >= 2 * _processors(ray):
                yield _result(ray, running.popleft())
        while running:
            yield _result(ray, running.popleft())


@contextmanager
def _cluster(num_workers: int) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise BadConfig(
            "tokenization.engine is ray, which is not installed: "
            "pip install 'compactgpt[ray]', or set it to local in params.yaml"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    ours = not ray.is_initialized()
    if ours:
        # A cluster of our own is told where this package lies, installed or not.
        places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        local = {"num_cpus": num_workers, "include_dashboard": False}
        try:
            ray.init(
                address=address or "local",
                runtime_env=None if address else {"env_vars": {"PYTHONPATH": places.rstrip(os.pathsep)}},
                log_to_driver=False,
                logging_level="error",
                **({} if address else local),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Unreachable(
                f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}): "
                "check RAY_ADDRESS, or set tokenization.engine to local in params.yaml"
            ) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _processors(ray: Any) -> int:
    """Ask anew each time: nodes come and go."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise Busy(
            f"a piece's Ray worker died {RETRIES + 1} times, most often for want of memory: "
            "give the workers more, and run the same command again"
        ) from error
