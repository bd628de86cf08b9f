"""Starts several training processes on this machine with torchrun's agent. Torch is imported only then."""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compactgpt.common.errors import Busy, PeerLost
from compactgpt.config import Launcher

INIT_METHOD = "COMPACTGPT_INIT_METHOD"  # where the processes of `launch` meet; without it: MASTER_ADDR


def launch(module: str, arguments: Sequence[str], launcher: Launcher) -> int:
    """Run `python -m module arguments` in `launcher.processes` processes on this machine.

    When a process is lost, all are started again, `launcher.max_restarts` times. A process that ends with any
    other exit code is not started again: torchrun's own restarts would repeat a user's mistake.

    Returns:
        The exit code: 0, or that of a process that failed.
    """
    for _ in range(launcher.max_restarts + 1):
        exit_codes = _launch_once(module, arguments, launcher)
        # Below 0: a signal ended the process.
        if mistakes := [code for code in exit_codes if code > 0 and code != PeerLost.exit_code]:
            return mistakes[0]
        if not exit_codes:
            return 0
    return PeerLost.exit_code if PeerLost.exit_code in exit_codes else 1


def _launch_once(module: str, arguments: Sequence[str], launcher: Launcher) -> list[int]:
    """Run the processes once. Returns the exit codes of those that failed.

    Raises:
        SystemExit: a signal asked this process to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A store over TCP listens on all interfaces without a password, and the agent runs code that it reads
    # there. So agent and processes meet in files of a private folder, and no second store is opened.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=launcher.processes,
            logs_specs=DefaultLogsSpecs(folder),
            run_id="training",
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "agent"),
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=launcher.timeout_seconds,
        )
        os.environ[INIT_METHOD] = (Path(folder) / "processes").as_uri()
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        logging.disable(logging.CRITICAL)  # torchrun logs tracebacks
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except SignalException:  # the agent passed SIGTERM on, and the processes wrote their state
            raise SystemExit(Busy.exit_code) from None
        except ChildFailedError as error:
            return [failure.exitcode for failure in error.failures.values()]
        finally:
            del os.environ[INIT_METHOD]
            logging.disable(logging.NOTSET)
    return []
