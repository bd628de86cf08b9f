"""Where tokenization runs its tasks: processes of this machine, or a Ray cluster.

Both call the same function on the same tasks and yield the results in the order of the tasks, so that the
outputs are the same. Ray is an extra (`pip install compactgpt[ray]`). The nodes of a cluster need this
package installed and the same folders mounted, since tasks name files.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
        engine: local processes, or the Ray cluster at RAY_ADDRESS (a local one if that is not set).
        function: importable by name; its argument and result can be serialized.
        tasks: taken one by one; a bounded number of them run or wait.
        num_workers: processes of the local engine, or of the local Ray cluster.

    Raises:
        BadConfig: Ray is not installed.
        Unreachable: there is no cluster at RAY_ADDRESS.
        Busy: the worker of a task was killed too often.
        Exception: whatever `function` raises, for the first task that raises.
    """
    if engine == "local":
        yield from ordered_map(function, tasks, num_workers)
        return
    ray = _connect(num_workers)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        running: deque[Any] = deque()
        for task in tasks:
            running.append(remote.remote(task))
            # Asked for each time, since nodes join and leave.
            processors = int(ray.cluster_resources().get("CPU", 1))
            if len(running) >= 2 * max(1, processors):
                yield _result(ray, running.popleft())
        while running:
            yield _result(ray, running.popleft())
    finally:
        ray.shutdown()


def _connect(num_workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise BadConfig(
            "tokenization.engine is ray, which is not installed: "
            "pip install 'compactgpt[ray]', or set it to local in params.yaml"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if not address:
        # The workers of a local cluster find this package by its path, installed or not.
        paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        options = {"address": "local", "num_cpus": num_workers, "runtime_env": environment}
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}): "
            "check RAY_ADDRESS, or set tokenization.engine to local in params.yaml"
        ) from error
    return ray


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # the function's own error, without Ray's traceback
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise Busy(
            f"the Ray worker of a task died {RETRIES + 1} times, most often because memory ran out: "
            "give the workers more memory, and run the same command again"
        ) from error
