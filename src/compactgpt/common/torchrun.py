"""Which of the processes that torchrun started this one is: torchrun puts it into the environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class DistInfo:
    """Rank of this process and number of processes; the defaults are those of a process without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files, logs and shows progress."""
        return self.rank == 0


def dist_info() -> DistInfo:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; without torchrun there is one process."""
    if not under_torchrun():
        return DistInfo()
    return DistInfo(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    )


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
