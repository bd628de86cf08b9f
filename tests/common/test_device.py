"""What the program asks of its process: memory that stays, in large pages, and no more than there is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compactgpt.common.device import resolve_device, stop_requests
from compactgpt.common.errors import BadConfig

ROOT = Path(__file__).parents[2]
SIZE = 64 << 20
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import re, resource, sys
sys.path.insert(0, {source!r})
from compactgpt.common.device import prepare_heap
if {limit}:
    resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
def said(path, key):
    return int(re.search(key + r":\\s+(\\d+) kB", open(path).read())[1]) << 10
took, before = prepare_heap(), said("/proc/self/status", "VmRSS")
for _ in range(3):
    block = bytearray({size})
    large = said("/proc/self/smaps_rollup", "AnonHugePages")
    del block
faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray({size})
faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(took, said("/proc/self/status", "VmRSS") - before, large, faults)
"""


def measure(limit=0):
    script = SCRIPT.format(source=str(ROOT / "src"), size=SIZE, limit=limit)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    took, *numbers = done.stdout.split()
    return took, *map(int, numbers)


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="no large pages here")
def test_large_tensors_lie_in_large_pages_that_are_used_again():
    took, grown, large, faults = measure()
    assert took == "True"
    assert SIZE <= grown < 1.2 * SIZE
    assert large > 0.8 * SIZE
    assert faults < 100


def test_where_memory_is_bounded_all_works_without():
    took, grown, large, _ = measure(limit=1 << 30)
    assert (took, large) == ("False", 0)
    assert grown > 0.99 * SIZE  # a few pages were free before


@pytest.mark.parametrize(("cuda", "mps"), [(True, True), (False, True), (False, False)])
def test_a_device_that_this_machine_does_not_have_is_refused_with_the_ones_it_has(cuda, mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    available = {"cuda": cuda, "mps": mps, "cpu": True}
    assert resolve_device("auto") == next(name for name in available if available[name])
    for device, is_available in available.items():
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
