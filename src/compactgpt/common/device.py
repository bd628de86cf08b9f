"""Settings of the process and its device that no user should have to make: allocator, threads, precision.

Call `prepare_process` first in a program that trains or evaluates, before it imports torch.
"""

import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Linux's mman.h
_MADV_HUGEPAGE = 14


def prepare_heap() -> bool:
    """Keep glibc from returning the memory of large tensors to the kernel, and put it on pages of 2 MB.

    Linux would fill returned pages with zeros again for the next tensor; keeping them makes training 1.2 to
    1.6 times as fast. Large pages add up to 1.2 (docs/benchmarks.md). The heap grows at once to half of the
    machine's memory. Linux takes no memory for it until it is written, and gives large pages where
    `transparent_hugepage` is `madvise` or `always`.

    Returns:
        Whether the settings took effect: with glibc only; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    libc.malloc.restype = ctypes.c_void_p
    heap = libc.malloc(ctypes.c_size_t(size))
    if not heap:  # the user limits the address space, with `ulimit -v`
        return False
    first = -(-heap // page) * page  # madvise takes whole pages
    failed = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(heap + size - first), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(heap))
    return not failed


def prepare_process(num_threads: int) -> None:
    """Set the allocator and the number of CPU threads of torch."""
    prepare_heap()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    # A thread that waits for others spins this often, then sleeps. With libgomp's default of 300,000 it
    # keeps the core from the thread that it waits for, when another program runs too (docs/decisions.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    torch.set_num_threads(num_threads)


def resolve_device(device: str) -> str:
    """Return `device`, or the best one of this machine where it is `auto`."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_precision(dtype: str) -> None:
    """Let Nvidia's tensor cores compute float32 products in TF32, unless `dtype` is float32 itself."""
    import torch

    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")


@contextmanager
def stop_requests(same_seconds: float = 1.0) -> Iterator[Callable[[], bool]]:
    """Let long work end where it chooses to: the first SIGTERM or Ctrl-C is only noted, a second one acts.

    Works in the main thread only. Yields a function that returns whether a stop was requested.

    Args:
        same_seconds: another signal within this time counts as the same request. When a parent with several
            threads is killed, Linux sends the child its death signal once for each thread.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    requested_at: float | None = None

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal requested_at
        if requested_at is None:
            requested_at = time.monotonic()
        elif time.monotonic() - requested_at >= same_seconds:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: requested_at is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
