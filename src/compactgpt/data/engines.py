"""Run tokenization tasks in local processes or on a Ray cluster.

Both engines call the same function on the same tasks and yield the results in task order, so the outputs
are the same. Ray is an extra (`pip install compactgpt[ray]`). Every node of a cluster needs this package
installed and the same folders mounted, since tasks contain file paths.
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
RETRIES = 5  # how often Ray runs a task again after its worker died


def run_tasks(
    engine: Literal["local", "ray"], function: Callable[[T], R], tasks: Iterable[T], num_workers: int
) -> Iterator[R]:
    """Yield `function(task)` for each task, in the order of the tasks.

    Args:
        engine: `local` (processes) or `ray` (the cluster at RAY_ADDRESS, or a local one if it is not set).
        function: can be imported by name; its argument and result can be serialized.
        tasks: read one by one; only a limited number of tasks run or wait at the same time.
        num_workers: number of processes of the local engine, or of the local Ray cluster.

    Raises:
        BadConfig: Ray is not installed.
        Unreachable: no Ray cluster answers at RAY_ADDRESS.
        Busy: the worker of one task died more than `RETRIES` times.
        Exception: the error of the first task whose `function` call raised an error.
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
            # Ask for the CPUs each time: nodes join and leave the cluster.
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
            "pip install 'compactgpt[ray]', or set tokenization.engine to local in params.yaml"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if not address:
        # Local workers find this package through PYTHONPATH, even if it is not installed.
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
