"""What the machine does while a stage runs: read from outside, so that no stage is slowed.

Names are those of MLflow's own system metrics, which its UI shows on a page of their own.
"""

import time
from contextlib import suppress
from typing import Any

SAMPLE_SECONDS = 5.0


class Gauge:
    """Looks at one process, all that it started, and the machine around them, every SAMPLE_SECONDS."""

    def __init__(self, pid: int, gpus: Any = None) -> None:
        """Begin to look.

        Args:
            pid: the process.
            gpus: MLflow's GPUMonitor, where there is one.
        """
        self._pid, self._gpus = pid, gpus
        self._begin = self._last = time.monotonic()
        self._spent = self._cpu_seconds()

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._last >= SAMPLE_SECONDS

    def look(self) -> tuple[int, dict[str, float]]:
        """Seconds since the first look, and what is seen: percent of one core, of memory, megabytes."""
        import psutil

        now, spent = time.monotonic(), self._cpu_seconds()
        memory = psutil.virtual_memory()
        seen = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": 100 * memory.used / memory.total,
            "system/stage_cpu_percentage": 100 * max(0.0, spent - self._spent) / max(1e-9, now - self._last),
            "system/stage_memory_megabytes": self._memory() / 1e6,
        }
        self._last, self._spent = now, spent
        return round(now - self._begin), seen | self._look_at_gpus()

    def _processes(self) -> list[Any]:
        import psutil

        with suppress(psutil.Error):
            own = psutil.Process(self._pid)
            return [own, *own.children(recursive=True)]
        return []

    def _cpu_seconds(self) -> float:
        import psutil

        total = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _memory(self) -> float:
        """Bytes in memory; what processes share is counted once for each."""
        import psutil

        total = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _look_at_gpus(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        self._gpus.collect_metrics()
        seen = self._gpus.aggregate_metrics()
        self._gpus.clear_metrics()
        return {f"system/{key}": float(value) for key, value in seen.items()}
