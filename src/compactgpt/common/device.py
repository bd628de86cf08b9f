"""Settings that belong to the process and that no user should have to make: allocator, threads.

Call `prepare_process` first thing in a program that trains or evaluates, before torch is imported.
"""

import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from compactgpt.config import Runtime

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Linux's mman.h
_MADV_HUGEPAGE = 14


def prepare_heap() -> bool:
    """Keep glibc from giving large tensors' memory back to the kernel, and have it in pages of 2 MB.

    Freed pages would be zeroed anew for the next tensor, and each of 4 kB would be looked up by itself: the
    first is worth 1.2 to 1.6 times the training speed, the second up to 1.2 (docs/benchmarks.md). The heap
    grows to half of the machine's memory at once, untouched and so not taken, and Linux is asked for large
    pages under all of it, which it gives where `transparent_hugepage` is `madvise` or `always`.

    Returns:
        Whether the settings took: glibc only, harmless elsewhere.
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
    if not heap:  # `ulimit -v`, say
        return False
    first = -(-heap // page) * page
    asked = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(heap + size - first), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(heap))
    return bool(asked == 0)


def prepare_process(runtime: Runtime) -> None:
    """Set the allocator and the number of threads."""
    prepare_heap()
    os.environ["OMP_NUM_THREADS"] = str(runtime.num_threads)
    # A thread that waits for its peers spins this often, then sleeps. libgomp's own 300,000 turns starve the
    # peer wherever another program wants a core; docs/decisions.md has the figures.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    torch.set_num_threads(runtime.num_threads)


def resolve_device(device: str) -> str:
    """Turn `auto` into the best device of this machine."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_precision(dtype: str) -> None:
    """Let Nvidia's tensor cores make fp32 products in TF32, unless plain float32 was asked for."""
    import torch

    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")


@contextmanager
def stop_requests(same_seconds: float = 1.0) -> Iterator[Callable[[], bool]]:
    """Let long work end at a place of its choice: the first SIGTERM or Ctrl-C is noted, the second acts.

    Main thread only. Yields a function that tells whether a stop was asked for.

    Args:
        same_seconds: within which another signal is the same request: when a parent with several threads
            is killed, Linux sends its child the death signal once for each thread that it had as a parent.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    asked_at: float | None = None

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
        elif time.monotonic() - asked_at >= same_seconds:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked_at is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
