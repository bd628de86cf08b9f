"""Several processes from one command: torchrun, started here or by whoever runs the cluster.

`launch` is torchrun as a library: an agent on each machine that starts its processes, starts all of them
again when one dies anywhere, and ends them when it is asked to end. Each process finds its place in the
environment that torchrun makes (RANK, WORLD_SIZE, LOCAL_RANK), no matter who started torchrun. Torch is
imported only to launch.
"""

import logging
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactgpt.config import Launcher
from compactgpt.errors import BadConfig, PeerLost, Unreachable

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

_OUTCOME = "COMPACTGPT_OUTCOME"  # names the file in which a process tells its launcher how it ended
_SIGNALLED = 75  # sysexits.h, EX_TEMPFAIL: run the same command again
_ANSWER_SECONDS = 60  # that the rendezvous of several machines has to answer
_BARRIER_SECONDS = 20  # that a machine which is done waits for the others to be


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


@dataclass(frozen=True)
class Nodes:
    """How many machines train one model together, and where they meet."""

    count: int = 1
    rendezvous: str = ""  # host:port of one of them, which all can reach


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


def launch(module: str, arguments: Sequence[str], launcher: Launcher, nodes: Nodes) -> int:
    """Run `python -m module arguments` in `launcher.processes` processes on this machine.

    On several machines each gives the same command. One that dies is waited for, `timeout_seconds` long.

    Returns:
        The exit code: 0, or that of the mistake which ended a process.

    Raises:
        BadConfig: where they meet is no address.
        Unreachable: nobody answers there.
        PeerLost: other machines are missing.
    """
    # Torch reads it as it is imported. Its own words for what is told here in a sentence are frames of C++.
    given = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    if not given:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the processes may say what they have to
    # Else the agent opens a second store to all the network, without a password.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as folder:
        meeting = _alone(folder) if nodes.count == 1 else _among(nodes, launcher)
        outcome = Path(folder) / "exit_code"
        os.environ[_OUTCOME] = str(outcome)
        logging.disable(logging.CRITICAL)  # what torchrun logs are tracebacks
        try:
            handler = get_rendezvous_handler(meeting)
            spec = WorkerSpec(
                role="training",
                local_world_size=launcher.processes,
                rdzv_handler=handler,
                entrypoint=sys.executable,
                args=("-m", module, *arguments),
                max_restarts=launcher.max_restarts,
            )
            agent = LocalElasticAgent(
                spec,
                DefaultLogsSpecs(folder),
                exit_barrier_timeout=_BARRIER_SECONDS,
                shutdown_timeout=launcher.timeout_seconds,
            )
            result = agent.run()
            handler.shutdown()
        except SignalException:
            return _told(outcome) or _SIGNALLED
        except RendezvousConnectionError as error:
            raise Unreachable(
                f"nothing answers at {nodes.rendezvous}, where {nodes.count} machines are to meet: start the "
                "same command there, and again here"
            ) from error
        except RendezvousError as error:
            raise PeerLost(
                f"{nodes.count} machines were to meet at {nodes.rendezvous} and did not within "
                f"{launcher.timeout_seconds} seconds (training.launcher.timeout_seconds): run the same "
                "command on all of them; it goes on from the last checkpoint"
            ) from error
        finally:
            del os.environ[_OUTCOME]
            logging.disable(logging.NOTSET)
        failures = result.failures if result else {}  # nothing: one machine too many, which was not needed
        exit_codes = [int(failure.exitcode) for failure in failures.values()]
        return _told(outcome) or (max(1, *exit_codes) if exit_codes else 0)


def _alone(folder: str) -> "RendezvousParameters":
    """Have the processes of this machine meet in files of a private folder.

    Torch's store over TCP listens to all the network, asks for no password, and what its agents read from it
    is run as code.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return RendezvousParameters(
        "c10d", str(Path(folder) / "agents"), uuid.uuid4().hex, 1, 1, "localhost", store_type="file"
    )


def _among(nodes: Nodes, launcher: Launcher) -> "RendezvousParameters":
    """Have machines meet over TCP, by the address that leads to the rendezvous: no name need be known.

    The machine of the rendezvous has process 0: torch gives it to the one whose address sorts first, and
    connects to that address alone.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    patience = min(_ANSWER_SECONDS, launcher.timeout_seconds)
    family, kind, _, _, place = _resolved(nodes.rendezvous, patience)
    with socket.socket(family, kind) as way:
        way.connect(place)  # of a datagram: nothing is sent, but the kernel chooses a way
        own = way.getsockname()[0]
    if interface := _interface(own):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    leads = own == place[0]
    address = own if interface else socket.getfqdn()
    return RendezvousParameters(
        "c10d",
        nodes.rendezvous,
        "compactgpt",
        nodes.count,
        nodes.count,
        address if leads else f"~{address}",
        is_host=leads,
        join_timeout=launcher.timeout_seconds,
        read_timeout=patience,
    )


def _resolved(rendezvous: str, seconds: float) -> tuple[Any, ...]:
    """Look up where machines meet; one that is starting may not be known yet, on Kubernetes for one."""
    host, _, port = rendezvous.rpartition(":")
    if not (host and port.isdecimal()):
        raise BadConfig(f"--rendezvous {rendezvous!r}: give host:port of one of the machines")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Unreachable(
                    f"--rendezvous {rendezvous!r}: no machine of this name is known here ({error}): give "
                    "a name or number that all machines know"
                ) from error
        time.sleep(1)


def _interface(address: str) -> str | None:
    """Name the network interface that has an address; None for a loopback one."""
    import psutil

    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(one.address == address for one in addresses)
            and "loopback" not in psutil.net_if_stats()[name].flags
        ),
        None,
    )


def meeting_place() -> str | None:
    """Where processes that `launch` started here alone find each other; None: as torchrun says."""
    if _OUTCOME not in os.environ or os.environ["GROUP_WORLD_SIZE"] != "1":
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
