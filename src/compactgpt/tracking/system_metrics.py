"""System metrics of a stage. Another process measures them, so that the stage does not become slower."""

import importlib.util
import time
from contextlib import suppress
from typing import Any

SAMPLE_SECONDS = 5.0


class SystemMetrics:
    """Measures one process and its children, and the whole machine with MLflow's CPU and GPU monitors."""

    def __init__(self, pid: int) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

        self._pid, self._monitors = pid, [CPUMonitor()]
        if importlib.util.find_spec("pynvml"):
            with suppress(ImportError, RuntimeError):  # the machine has no Nvidia GPU
                from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

                self._monitors.append(GPUMonitor())
        self._begin = self._last = time.monotonic()
        self._cpu_seconds, _ = self._usage()

    def sample(self) -> list[dict[str, Any]]:
        """Return one journal line of metrics, or an empty list if SAMPLE_SECONDS have not passed.

        The stage's CPU use is in percent of one core, its memory in megabytes.
        """
        now = time.monotonic()
        if now - self._last < SAMPLE_SECONDS:
            return []
        cpu_seconds, memory = self._usage()
        percent = 100 * (cpu_seconds - self._cpu_seconds) / max(1e-9, now - self._last)
        values = {
            "system/stage_cpu_percentage": max(0.0, percent),
            "system/stage_memory_megabytes": memory / 1e6,
        }
        self._last, self._cpu_seconds = now, cpu_seconds
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        step, time_ms = round(now - self._begin), time.time_ns() // 1_000_000
        return [{"kind": "metrics", "time_ms": time_ms, "step": step, "values": values, "system": True}]

    def _usage(self) -> tuple[float, float]:
        """Return the CPU time in seconds and the memory in bytes of the process and its children."""
        import psutil

        cpu_seconds = memory = 0.0
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._pid)
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    cpu_seconds += times.user + times.system
                    memory += process.memory_info().rss  # shared memory is counted for each process
        return cpu_seconds, memory
