"""Several processes from one command: torchrun, started here or by whoever runs the cluster.

`launch` is torchrun as a library: an agent that starts the processes, starts all of them again when one
dies, and ends them when it is asked to end. Each process finds its place in the environment that torchrun
makes (RANK, WORLD_SIZE, LOCAL_RANK), no matter who started torchrun. Torch is imported only to launch.
"""

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compactgpt.config import Launcher
from compactgpt.errors import PeerLost

_OUTCOME = "COMPACTGPT_OUTCOME"  # names the file in which a process tells its launcher how it ended
_SIGNALLED = 75  # sysexits.h, EX_TEMPFAIL: run the same command again


@dataclass(frozen=True)
class Place:
    """Which of the processes that train one model this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def leads(self) -> bool:
        """Whether this process writes files, logs and shows progress: one does."""
        return self.rank == 0


def own_place() -> Place:
    """Read what torchrun says in the environment; without torchrun a process is alone."""
    if not under_torchrun():
        return Place()
    return Place(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    )


def under_torchrun() -> bool:
    """Tell whether torchrun, or something that speaks as it does, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def launch(module: str, arguments: Sequence[str], launcher: Launcher) -> int:
    """Run `python -m module arguments` in `launcher.processes` processes on this machine.

    They meet in files of a private folder: torch's store over TCP listens to all the network, asks for no
    password, and what its agents read from it is run as code.

    Returns:
        The exit code: 0, or that of the mistake which ended a process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=launcher.processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "agents"),
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=launcher.max_restarts,
            shutdown_timeout=launcher.timeout_seconds,
        )
        outcome = Path(folder) / "exit_code"
        os.environ[_OUTCOME] = str(outcome)
        # Else the agent opens a store to all the network, without a password.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except SignalException:
            return _told(outcome) or _SIGNALLED
        except ChildFailedError as error:
            first = min(error.failures.items(), key=lambda item: item[1].timestamp)[1]
            return _told(outcome) or max(1, first.exitcode)
        finally:
            del os.environ[_OUTCOME]
        return _told(outcome)


def meeting_place() -> str | None:
    """Where processes that `launch` started find each other; None: as torchrun says in the environment."""
    if _OUTCOME not in os.environ:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Path(os.environ[_OUTCOME]).with_name(f"processes-{attempt}").as_uri()


def _told(outcome: Path) -> int:
    return int(outcome.read_text()) if outcome.exists() else 0


def final_exit_code(error: Exception, exit_code: int) -> int:
    """Turn a mistake's exit code into the one to leave torchrun with.

    torchrun starts everything again after any code but 0. That mends a lost process and nothing else: a
    mistake of the user would only be made again. So it is told to our launcher, if there is one.
    """
    outcome = os.environ.get(_OUTCOME)
    if outcome is None or isinstance(error, PeerLost):
        return exit_code
    Path(outcome).write_text(str(exit_code))
    return 0
