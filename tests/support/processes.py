"""Processes that start in milliseconds: forks of a server that has imported torch and the trainer once."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports torch._dynamo.
_context.set_forkserver_preload(["compactgpt.training.trainer", "torch._dynamo", "compactgpt.training.fsdp"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), str(TESTS.parent / "src")])


def run(function: Callable[..., Any], *args: Any) -> int:
    """Run `function(*args)` in a new process. Returns its exit code, or minus the signal that ended it."""
    (code,) = _run_all(function, [args])
    return code


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[int]:
    """Run `function(*args)` in `size` processes, each with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return _run_all(_as_rank, [(rank, size, port, function, *args) for rank in range(size)])


def _run_all(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[int]:
    processes = [_context.Process(target=_on_one_thread, args=(function, *args)) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "the process hangs"
    return [process.exitcode for process in processes]


def _on_one_thread(function: Callable[..., Any], *args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    function(*args)


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], *args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), TORCHELASTIC_RUN_ID="test")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    function(*args)


class ForkServer:
    """A process that calls `prepare` once, usually to import modules, and then runs functions in forks."""

    def __init__(self, prepare: Callable[..., Any], *args: Any) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        self._end, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_serve_forks, args=(theirs, prepare, args))
        self._process.start()
        theirs.close()
        assert self._end.poll(300), "the server does not start"
        self._end.recv()

    def run(self, function: Callable[..., Any], *args: Any) -> int:
        """Run `function(*args)` in a fork. Returns its exit code, or minus the signal that ended it."""
        self._end.send((function, args))
        code: int | None = self._end.recv()
        assert code is not None, "the fork hangs"
        return code

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.join()


def _serve_forks(end: Any, prepare: Callable[..., Any], args: tuple[Any, ...]) -> None:
    prepare(*args)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    end.send(None)
    while True:
        function, args = end.recv()
        fork = multiprocessing.get_context("fork").Process(target=function, args=args)
        fork.start()
        fork.join(60)
        end.send(fork.exitcode)
        fork.kill()
