"""System metrics of a stage, read from another process, so that they do not slow the stage."""

import importlib.util
import time
from contextlib import suppress
from typing import Any

from compactgpt.tracking.journal import now_ms

SAMPLE_SECONDS = 5.0


class SystemMetrics:
    """Samples one process, its children and the machine, under the names of MLflow's own system metrics."""

    def __init__(self, pid: int) -> None:
        self._pid, self._gpus = pid, _gpu_monitor()
        self._begin = self._last = time.monotonic()
        self._spent = self._cpu_seconds()

    def due(self) -> list[dict[str, Any]]:
        """Return a journal line of metrics every SAMPLE_SECONDS: percent of a core, of memory, MB."""
        import psutil

        now = time.monotonic()
        if now - self._last < SAMPLE_SECONDS:
            return []
        spent, memory = self._cpu_seconds(), psutil.virtual_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": 100 * memory.used / memory.total,
            "system/stage_cpu_percentage": 100 * max(0.0, spent - self._spent) / max(1e-9, now - self._last),
            "system/stage_memory_megabytes": self._memory() / 1e6,
        }
        self._last, self._spent = now, spent
        step = round(now - self._begin)
        values |= self._gpu_metrics()
        return [{"kind": "metrics", "time_ms": now_ms(), "step": step, "values": values, "system": True}]

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
        """Return bytes in memory; what processes share is counted once for each."""
        import psutil

        total = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _gpu_metrics(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        self._gpus.collect_metrics()
        found = self._gpus.aggregate_metrics()
        self._gpus.clear_metrics()
        return {f"system/{key}": float(value) for key, value in found.items()}


def _gpu_monitor() -> Any:
    """Return MLflow's monitor of Nvidia's GPUs, where nvidia-ml-py is installed and there are GPUs."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    with suppress(ImportError, RuntimeError):
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        return GPUMonitor()
    return None
