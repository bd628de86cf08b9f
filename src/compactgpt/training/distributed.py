"""Train one model with several processes, started by `launch` or torchrun.

Each process trains on a slice of the batch. In mode `fsdp`, each process holds only a part of the model.
Two trainings with the same number of processes give bit-identical weights.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compactgpt.common.device import DistInfo, dist_info
from compactgpt.common.errors import BadConfig, Busy, PeerLost, UserError
from compactgpt.config import Launcher

# `launch` sets this environment variable to the URL at which its processes connect. Processes of torchrun
# connect at MASTER_ADDR instead.
INIT_METHOD = "COMPACTGPT_INIT_METHOD"
T = TypeVar("T")


class Group:
    """The processes that train one model; by default a single process."""

    def __init__(self, info: DistInfo = DistInfo(), mode: str = "fast") -> None:  # noqa: B008  a DistInfo is frozen
        self.rank, self.world_size, self.is_main_process = info.rank, info.world_size, info.is_main_process
        self.is_sharded = mode == "fsdp" and info.world_size > 1

    def batch_slice(self, sequences: int, micro_batch_size: int) -> slice:
        """Return the slice of a step's sequences that this process trains on.

        Raises BadConfig if the micro-batches can't be divided evenly among the processes.
        """
        micro_batches = sequences // micro_batch_size
        if sequences % micro_batch_size or micro_batches % self.world_size:
            raise BadConfig(
                f"training.tokens_per_step: {sequences} sequences can't be divided into micro-batches of "
                f"{micro_batch_size} among {self.world_size} processes: change tokens_per_step, "
                "micro_batch_size or the number of processes"
            )
        own = sequences // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its sum over all processes; return the loss, summed over all processes."""
        if self.world_size == 1:
            return loss
        if self.is_sharded:  # FSDP2 already summed the gradients
            dist.all_reduce(loss)
            return loss
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        flat = torch.cat([loss.float().reshape(1), *(grad.reshape(-1) for grad in grads)])
        dist.all_reduce(flat)
        sums = torch.split(flat[1:], [grad.numel() for grad in grads])
        # Copy the sums into the existing gradient tensors. Views of `flat` have other addresses, and the
        # rounding of some kernels depends on the address.
        for grad, summed in zip(grads, sums, strict=True):
            grad.copy_(summed.view_as(grad))
        return flat[0]

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is True in any process; all processes get the same answer."""
        if self.world_size == 1:
            return flag
        # The tensor is on the CPU: reading a GPU tensor would wait for earlier work.
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def assert_same_on_all_ranks(self, what: str, value: str) -> None:
        """Raise BadConfig if two processes have different values; `what` names the value in the message."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise BadConfig(
                f"processes {others} differ from process 0 in their {what}: make these the same on all nodes"
            )

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors`; in the main process, sharded tensors become full tensors on the CPU.

        The other processes get their own shards. Every process must call this function.
        """
        full = dict(tensors)
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):
                gathered_tensor = tensor.full_tensor()  # all processes must take part
                if self.is_main_process:
                    full[name] = gathered_tensor.cpu()
        return full

    @torch.no_grad()
    def scatter(self, full: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Copy the main process's full tensors, `full`, into the `tensors` of every process.

        `tensors` may be sharded. The other processes may pass an empty dict as `full`.
        """
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                sharded: Any = tensor
                source = full[name] if self.is_main_process else torch.empty(tensor.shape)
                source = source.to(tensor.device)
                tensor.copy_(distribute_tensor(source, sharded.device_mesh, sharded.placements))
                continue
            if self.is_main_process:
                tensor.copy_(full[name])
            if self.world_size > 1:
                dist.broadcast(tensor, 0)

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process only, and return its result in every process.

        If `work` fails, the main process raises the error, and all other processes exit with code 0.
        """
        result: Any = None
        failure: Exception | None = None
        if self.is_main_process:
            try:
                result = work()
            except (UserError, OSError) as error:
                failure = error
        shared = [result, failure is not None]
        if self.world_size > 1:
            dist.broadcast_object_list(shared)
        if failure:
            raise failure
        result, has_failed = shared
        if has_failed:
            # Exit with code 0. At another code, torchrun would stop the main process, which may not yet have
            # printed its error message.
            raise SystemExit(0)
        return cast(T, result)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the `with` block, gather a sharded model's embeddings and last layer norm in each process."""
    if not hasattr(model, "unshard"):
        yield
        return
    sharded: Any = model  # a torch FSDPModule; Any, because only mode fsdp imports this class
    sharded.unshard()
    yield
    sharded.reshard()


@contextmanager
def init_process_group(launcher: Launcher, device: str) -> Iterator[Group]:
    """Connect the processes that torchrun started, and yield their Group.

    Raises PeerLost if another process ended, or did not answer within launcher.timeout_seconds.
    """
    info = dist_info()
    if info.world_size == 1:
        yield Group(info)
        return
    if device == "cuda":
        torch.cuda.set_device(info.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=os.environ.get(INIT_METHOD),
            rank=info.rank,
            world_size=info.world_size,
            timeout=datetime.timedelta(seconds=launcher.timeout_seconds),
        )
        yield Group(info, launcher.mode)
    except BaseException as error:
        is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and is_lost:
            # Do not destroy a broken group: the call may hang, and the process ends anyway.
            raise PeerLost(
                "another process of this training ended or did not answer: if the training does not restart "
                "by itself, run the same command again to resume from the last training state "
                f"({str(error).splitlines()[0][:160]})"
            ) from error
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def launch(module: str, arguments: Sequence[str], launcher: Launcher) -> int:
    """Run `python -m module arguments` in several processes on this machine, and return the exit code.

    If a process is killed, or loses contact with another process, all processes are started again. This
    happens at most `launcher.max_restarts` times.
    """
    exit_codes: list[int] = []
    for _attempt in range(launcher.max_restarts + 1):
        exit_codes = _run_processes([sys.executable, "-m", module, *arguments], launcher)
        if not exit_codes:
            return 0
        # An exit code from 1 to 127 reports an error. If signal N ended the process, the exit code is -N (in
        # Popen) or 128 + N (in a shell), and a second attempt may succeed.
        error_codes = [code for code in exit_codes if 0 < code < 128 and code != PeerLost.exit_code]
        if error_codes:  # a second attempt would fail with the same error
            return error_codes[0]
    return PeerLost.exit_code if PeerLost.exit_code in exit_codes else 1


def _run_processes(command: Sequence[str], launcher: Launcher) -> list[int]:
    """Run `command` in `launcher.processes` processes; return the exit codes of the processes that failed."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as folder:
        # Connect through a file and the loopback interface: by default, torch listens on all interfaces.
        shared = {
            **os.environ,
            INIT_METHOD: (Path(folder) / "store").as_uri(),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
            "TORCHELASTIC_RUN_ID": "training",
            "WORLD_SIZE": str(launcher.processes),
        }
        try:
            for rank in range(launcher.processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env={**shared, **own}))
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    break  # the other processes would only wait for the process that failed
                time.sleep(0.1)
        except (KeyboardInterrupt, SystemExit):
            # Ctrl-C or SIGTERM: `_terminate` sends SIGTERM to the processes, which save the training state.
            raise SystemExit(Busy.exit_code) from None
        finally:
            _terminate(processes, launcher.timeout_seconds)
    return [process.returncode for process in processes if process.returncode]


def _terminate(processes: Sequence[subprocess.Popen[bytes]], timeout_seconds: float) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + timeout_seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
