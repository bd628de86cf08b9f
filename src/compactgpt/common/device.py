"""Set up a process that trains or evaluates: memory, CPU threads, device, precision, signals.

A program calls `prepare_process` before it imports torch.
"""

import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from compactgpt.common.errors import BadConfig

# Options of glibc's mallopt (malloc.h)
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14  # from Linux's mman.h


def prepare_heap() -> bool:
    """Make glibc keep freed memory, and ask Linux for large pages; return whether both worked.

    Kept memory makes training 1.2 to 1.6 times as fast. Large pages add a factor of up to 1.2.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    libc.malloc.restype = ctypes.c_void_p
    # A page of this block uses no memory until the process writes to it.
    heap = libc.malloc(ctypes.c_size_t(size))
    if not heap:  # malloc fails if `ulimit -v` limits the address space
        return False
    first = -(-heap // page) * page  # madvise needs an address at which a page starts
    failed = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(heap + size - first), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(heap))
    return not failed


def prepare_process(num_threads: int) -> None:
    """Make memory allocation faster (`prepare_heap`), and set the number of CPU threads that torch uses."""
    prepare_heap()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    # How often a waiting OpenMP thread loops before it sleeps. libgomp's default of 300,000 can block a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    torch.set_num_threads(num_threads)


def resolve_device(device: str) -> str:
    """Return `device`, or for `auto` the fastest device. Raises BadConfig if torch can't use `device`."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in available if available[name])
    if not available[device]:
        raise BadConfig(
            f"runtime.device: found {device}, which torch {torch.__version__} can't use here; "
            f"use auto, or {' or '.join(name for name in available if available[name])}"
        )
    return device


@dataclass(frozen=True)
class DistInfo:
    """The rank of this process and the number of processes; by default a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank among the processes of this machine

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and log messages, and shows progress."""
        return self.rank == 0


def dist_info() -> DistInfo:
    """Return the rank and the number of processes; without torchrun, those of a single process."""
    if not under_torchrun():
        return DistInfo()
    return DistInfo(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def under_torchrun() -> bool:
    """Return whether torchrun or `training.distributed.launch` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def set_precision(dtype: str) -> None:
    """Let Nvidia's GPUs multiply float32 matrices in the less exact TF32, except for `dtype` float32."""
    import torch

    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")


@contextmanager
def stop_requests(same_seconds: float = 1.0) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or Ctrl-C has requested a stop.

    A second signal ends the process, unless it comes within `same_seconds` of the first.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    requested_at: float | None = None

    def record(number: int, _frame: FrameType | None) -> None:
        nonlocal requested_at
        if requested_at is None:
            requested_at = time.monotonic()
        elif time.monotonic() - requested_at >= same_seconds:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, record)
    try:
        yield lambda: requested_at is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
