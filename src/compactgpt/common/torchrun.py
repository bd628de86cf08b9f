"""Read from torchrun's environment variables which of its processes this process is."""

import os
from dataclasses import dataclass

from compactgpt.common.errors import BadConfig


@dataclass(frozen=True)
class DistInfo:
    """Rank of this process and number of processes; the defaults are those of a process without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank among the processes of this machine

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files, logs and shows progress."""
        return self.rank == 0


def dist_info() -> DistInfo:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; without torchrun there is one process."""
    if not under_torchrun():
        return DistInfo()
    return DistInfo(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_environment() -> None:
    """Raise BadConfig if RANK and WORLD_SIZE are set without torchrun, as a cluster's shell may leave them.

    Libraries read these variables, too, and would wait for processes that do not exist.
    """
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not found or under_torchrun() or found == {"RANK": "0", "WORLD_SIZE": "1"}:
        return
    values = " and ".join(f"{name}={value!r}" for name, value in found.items())
    raise BadConfig(
        f"the environment has {values}, but torchrun did not start this process: run "
        "`unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT`, or start the training with torchrun"
    )
