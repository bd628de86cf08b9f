"""Processes in milliseconds: forks of a server that has imported torch and the trainer once."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_context = multiprocessing.get_context("forkserver")
# Optimizers import dynamo.
_context.set_forkserver_preload(["test_training", "torch._dynamo", "compactgpt.sharding"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "src")])


def start(function: Callable[..., Any], *args: Any) -> multiprocessing.Process:
    """Start `function(*args)` in a process of its own, on one thread."""
    process = _context.Process(target=_on_one_thread, args=(function, *args))
    process.start()
    return process


def run(function: Callable[..., Any], *args: Any, seconds: float = 60) -> int:
    """Run `function(*args)` in a process of its own; its exit code, or minus the signal that ended it."""
    return wait(start(function, *args), seconds)


def wait(process: multiprocessing.Process, seconds: float = 60) -> int:
    """Wait for a process to end."""
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def together(size: int, function: Callable[..., Any], *args: Any) -> list[int]:
    """Run `function(*args)` in `size` processes, each told its place as torchrun tells it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_placed, rank, size, port, function, *args) for rank in range(size)]
    return [wait(process) for process in processes]


def _on_one_thread(function: Callable[..., Any], *args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    function(*args)


def _placed(rank: int, size: int, port: int, function: Callable[..., Any], *args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    function(*args)
