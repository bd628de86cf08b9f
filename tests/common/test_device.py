"""A process keeps freed memory in large pages, finds its device, and stops when it is asked to."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compactgpt.common.device import resolve_device, stop_requests
from compactgpt.common.errors import BadConfig

SIZE = 64 << 20
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIMIT = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))"
SCRIPT = f"""
import re, resource
from compactgpt.common.device import prepare_heap
took = prepare_heap()
for _ in range(3):
    block = bytearray({SIZE})
    large = re.search(r"AnonHugePages:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read())[1]
    del block
faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray({SIZE})
print(took, large, faults + resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def run_script(head: str = "") -> list[str]:
    command = [sys.executable, "-c", head + SCRIPT]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="no large pages here")
def test_large_tensors_lie_in_large_pages_that_are_used_again():
    took, large, faults = run_script()
    assert (took, int(large) << 10 > 0.8 * SIZE, int(faults) < 100) == ("True", True, True)


def test_where_memory_is_bounded_all_works_without():
    assert run_script(LIMIT)[:2] == ["False", "0"]


@pytest.mark.parametrize(("cuda", "mps"), [(True, True), (False, True), (False, False)])
def test_a_device_that_this_machine_does_not_have_is_refused_with_the_ones_it_has(cuda, mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == ("cuda" if cuda else "mps" if mps else "cpu")
    for device, is_available in {"cuda": cuda, "mps": mps, "cpu": True}.items():
        if is_available:
            assert resolve_device(device) == device
        else:
            with pytest.raises(BadConfig, match=f"found {device}, .* use auto, or .*cpu"):
                resolve_device(device)


def test_a_second_ctrl_c_interrupts_at_once_but_an_echo_of_the_first_does_not():
    with stop_requests(same_seconds=0.05) as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # Linux may send the signal of one request several times
        assert stopping()
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
