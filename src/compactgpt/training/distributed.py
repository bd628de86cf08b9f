"""Several processes train one model together: the batch slice of each, summed gradients, decisions of all.

Every process draws the whole batch of a step, a pure function of (seed, step), and takes its slice, so that
tokens_per_step does not change with the number of processes. Two modes sum the gradients. Each is repeatable
for one number of processes, which orders the sums.

fast    data parallel: one all-reduce of the whole gradient after the last micro-batch.
fsdp    FSDP2 shards the model over the processes (module `sharding`) and sums gradients after every
        micro-batch.
"""

import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compactgpt.common.errors import BadConfig, PeerLost, UserError
from compactgpt.common.torchrun import DistInfo, dist_info
from compactgpt.config import Launcher
from compactgpt.training.launching import INIT_METHOD

T = TypeVar("T")


class Group:
    """The processes that train one model together, as `init_process_group` opens them."""

    def __init__(self, info: DistInfo, mode: str) -> None:
        self.rank, self.world_size, self.is_main_process = info.rank, info.world_size, info.is_main_process
        self.mode = mode
        self.is_sharded = mode == "fsdp" and info.world_size > 1

    def batch_slice(self, sequences: int, micro_batch_size: int) -> slice:
        """Return which rows of a step's batch this process takes.

        Raises:
            BadConfig: the rows can't be divided evenly.
        """
        micro_batches = sequences // micro_batch_size
        if sequences % micro_batch_size or micro_batches % self.world_size:
            raise BadConfig(
                f"training.tokens_per_step: {sequences} sequences can't be shared out evenly "
                f"in micro-batches of {micro_batch_size} (training.micro_batch_size) among {self.world_size} "
                "processes: change one of the three"
            )
        own = sequences // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each process's gradients by their sum, and return the sum of the losses. ()."""
        if self.world_size == 1:
            return loss
        if self.is_sharded:  # FSDP2 has summed the gradients
            dist.all_reduce(loss)
            return loss
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        flat = torch.cat([loss.float().reshape(1), *(grad.reshape(-1) for grad in grads)])
        with _peer_errors():
            dist.all_reduce(flat)
        parts = torch.split(flat[1:], [grad.numel() for grad in grads])
        # Back into the tensors of autograd: kernels may round by where a tensor begins in memory.
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return flat[0]

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a sharded model as every process's ordinary tensor."""
        return cast(Tensor, tensor.full_tensor()) if self.is_sharded else tensor  # type: ignore[attr-defined]

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag of any process is set: they all stop after the same step, or none does."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag))  # on the CPU: nothing waits for a GPU
        with _peer_errors():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def assert_same_on_all_ranks(self, what: str, value: str) -> None:
        """Compare a value of all processes.

        Raises:
            BadConfig: a process has another one.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256(value.encode()).digest()[:8]
        own = torch.tensor([int.from_bytes(digest, "big", signed=True)])
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        with _peer_errors():
            dist.all_gather(found, own)
        others = [rank for rank, theirs in enumerate(found) if theirs.item() != found[0].item()]
        if others:
            raise BadConfig(f"processes {others} have another {what} than process 0: give all nodes the same")

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the main process."""
        if self.world_size > 1:
            with _peer_errors():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def broadcast_number(self, number: int) -> int:
        """Return the main process's number."""
        tensor = torch.tensor(number)
        self.broadcast([tensor])
        return int(tensor.item())

    def broadcast_text(self, text: str) -> str:
        """Return the main process's text. torch's own way serialises objects, which runs code."""
        tensor = torch.tensor(list(text.encode()), dtype=torch.uint8)
        tensor.resize_(self.broadcast_number(len(tensor)))
        self.broadcast([tensor])
        return bytes(tensor.tolist()).decode()

    def run_on_main(self, work: Callable[[], T]) -> T | None:
        """Call `work` in the main process alone. Returns its result there, None elsewhere.

        Raises:
            UserError, OSError: in the main process. The others exit without a message: it is shown once.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.is_main_process:
            try:
                result = work()
            except (UserError, OSError) as error:
                failure = error
        failed = self.any_rank(failure is not None)
        if failure:
            raise failure
        if failed:
            raise SystemExit(0)
        return result


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the embeddings, the head and the last norm of a sharded model; does nothing for other models."""
    if not hasattr(model, "unshard"):
        yield
        return
    sharded: Any = model  # torch's FSDPModule, which only mode fsdp loads
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


@contextmanager
def _peer_errors(*, all_errors: bool = True) -> Iterator[None]:
    """Turn the loss of another process, for which torch raises RuntimeErrors, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not (all_errors or isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        message = str(error).splitlines()[0][:160]
        raise PeerLost(
            "another process of this training died or fell silent: torchrun starts all of them again "
            f"from the last checkpoint; without it, run the same command again ({message})"
        ) from error


@contextmanager
def init_process_group(launcher: Launcher, device: str) -> Iterator[Group]:
    """Join the processes that torchrun started; one process alone needs no torchrun.

    Args:
        launcher: of params.yaml; the number of processes is what torchrun says.
        device: `cpu`, `cuda` or `mps`.
    """
    info = dist_info()
    if info.world_size == 1:
        yield Group(info, launcher.mode)
        return
    if device == "cuda":
        torch.cuda.set_device(info.local_rank)
    with _peer_errors():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=os.environ.get(INIT_METHOD),
            rank=info.rank,
            world_size=info.world_size,
            timeout=datetime.timedelta(seconds=launcher.timeout_seconds),
        )
    try:
        with _peer_errors(all_errors=False):  # a sharded model communicates in every layer
            yield Group(info, launcher.mode)
    except PeerLost:  # destroying a broken group may hang, and the process ends anyway
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
