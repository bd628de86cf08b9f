"""Run tasks in local processes or on a Ray cluster, with the results in the order of the tasks.

Ray is an extra (`pip install compactgpt[ray]`). Every node of a cluster needs this package installed and the
project's folder at the same path, since tasks contain file paths.
"""

import os
from collections.abc import Callable, Iterable, Iterator
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

    `local` starts `num_workers` processes. `ray` uses the cluster at RAY_ADDRESS, or starts one here. The
    function, its argument and its result can be pickled; an error of the function is raised here.
    Raises BadConfig if Ray is not installed, Unreachable if no cluster answers, Busy if workers die.
    """
    if engine == "local":
        yield from ordered_map(function, tasks, num_workers)
        return
    ray = _connect(num_workers)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        for reference in [remote.remote(function, task) for task in tasks]:
            yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # the function's own error, without Ray's traceback
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise Busy(
            f"the Ray worker of a task died {RETRIES + 1} times, most often because memory ran out: "
            "give the workers more memory, and run the same command again"
        ) from error
    finally:
        ray.shutdown()


def _call(function: Callable[[T], R], task: T) -> R:
    return function(task)  # Ray accepts a function, but not a functools.partial


def _connect(num_workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise BadConfig(
            "tokenization.engine is ray, which is not installed: "
            "pip install 'compactgpt[ray]', or set tokenization.engine to local in params.yaml"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address or "local"}
    if not address:
        options["num_cpus"] = num_workers
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}): "
            "check RAY_ADDRESS, or set tokenization.engine to local in params.yaml"
        ) from error
    return ray
