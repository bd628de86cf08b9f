"""What the program asks of its process: memory that stays, in large pages, and no more than there is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compactgpt.common.device import stop_requests

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
    assert grown >= SIZE


def test_a_second_ctrl_c_interrupts_at_once_but_an_echo_of_the_first_does_not():
    with stop_requests(same_seconds=0.05) as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # Linux may send the signal of one request several times
        assert stopping()
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
