"""Processes that train one model together: who works on which rows, and how gradients become one.

A step's batch is drawn whole by everyone, a pure function of (seed, step), and each process takes its
slice of the rows: tokens_per_step never changes with the number of processes. Three modes add up gradients.

fast    one all-reduce of the whole gradient. Repeatable for a number of processes, which orders the sums.
strict  gradients of single micro-batches, added in one fixed binary tree: the lower levels inside a
        process, the upper ones between processes by recursive doubling (Thakur et al. 2005, Optimization
        of collective communication operations in MPICH). Addition of two numbers is commutative to the
        bit, so 1, 2, 4, ... processes get the same bits. Costs log2(processes) exchanges of the whole
        gradient, where an all-reduce costs two at most, and a copy of it for each level of the tree inside.
fsdp    the model itself is spread over the processes (the room `sharding`), and gradients are added up where
        their rows live, after every micro-batch. Repeatable for a number of processes.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compactgpt.config import Launcher
from compactgpt.errors import BadConfig, PeerLost, UserError
from compactgpt.launching import Place, meeting_place, own_place

T = TypeVar("T")
Leaf = Callable[[int], Tensor]
"""Makes the gradient of one micro-batch, given its number, and returns its loss. () -> ()"""


class Group:
    """The processes that train one model; made by `joined`. Alone, every verb is free."""

    def __init__(self, place: Place, mode: str) -> None:
        self.rank, self.size, self.leads, self.mode = place.rank, place.size, place.leads, mode
        self.spreads = mode == "fsdp" and place.size > 1  # the model, over all processes

    def rows(self, sequences: int, micro_batch_size: int) -> slice:
        """Say which rows of a step's batch are this process's.

        Raises:
            BadConfig: they don't divide.
        """
        leaves = sequences // micro_batch_size
        if sequences % micro_batch_size or leaves % self.size:
            raise BadConfig(
                f"training.tokens_per_step: {sequences} sequences can't be shared out evenly "
                f"in micro-batches of {micro_batch_size} (training.micro_batch_size) among {self.size} "
                "processes: change one of the three"
            )
        if self.mode == "strict" and self.size & (self.size - 1):
            raise BadConfig(
                f"training.launcher.mode: strict needs 1, 2, 4, 8, ... processes, found {self.size}"
            )
        own = sequences // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def gradient(self, parameters: Sequence[nn.Parameter], leaves: int, leaf: Leaf) -> Tensor:
        """Leave the sum of everybody's gradients in the parameters, and return the sum of the losses.

        Args:
            parameters: without gradients now.
            leaves: micro-batches of this process.
            leaf: of a micro-batch, counted over all processes.
        """
        first = self.rank * leaves
        if self.mode == "strict":
            loss = _tree_sum(parameters, first, leaves, leaf)
        else:
            loss = torch.stack([leaf(first + number) for number in range(leaves)]).sum()
        if self.spreads:  # the gradients are added up already
            dist.all_reduce(loss)
        elif self.size > 1:
            loss = self._added_up(parameters, loss)
        return loss

    def _added_up(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        flat = torch.cat([loss.float().reshape(1), *(grad.reshape(-1) for grad in grads)])
        with _peers():
            if self.mode == "strict":
                self._double_recursively(flat)
            else:
                dist.all_reduce(flat)
        parts = torch.split(flat[1:], [grad.numel() for grad in grads])
        # Back into the tensors of autograd: kernels may round by where a tensor begins in memory.
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return flat[0]

    def _double_recursively(self, flat: Tensor) -> None:
        """Add up over all processes, neighbours first: after round k, 2^(k+1) of them hold one sum."""
        other = torch.empty_like(flat)
        distance = 1
        while distance < self.size:
            peer = self.rank ^ distance
            ends = [dist.P2POp(dist.isend, flat, peer), dist.P2POp(dist.irecv, other, peer)]
            for request in dist.batch_isend_irecv(ends):
                request.wait()
            flat.add_(other)
            distance *= 2

    def whole(self, tensor: Tensor) -> Tensor:
        """Make a number of a spread model known to every process. ()."""
        return cast(Tensor, tensor.full_tensor()) if self.spreads else tensor  # type: ignore[attr-defined]

    def any_of(self, flag: bool) -> bool:
        """Tell whether any process says yes: they stop after the same step, or not at all."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag))  # on the CPU: nobody waits for a GPU
        with _peers():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def agree(self, what: str, value: str) -> None:
        """See that all processes hold the same value.

        Raises:
            BadConfig: one does not.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(value.encode()).digest()[:8]
        own = torch.tensor([int.from_bytes(digest, "big", signed=True)])
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            dist.all_gather(found, own)
        others = [rank for rank, theirs in enumerate(found) if theirs.item() != found[0].item()]
        if others:
            raise BadConfig(f"processes {others} have another {what} than process 0: give all nodes the same")

    def from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the process that leads."""
        if self.size > 1:
            with _peers():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def number_from_leader(self, number: int) -> int:
        """Return the number that the process that leads has given."""
        told = torch.tensor(number)
        self.from_leader([told])
        return int(told.item())

    def text_from_leader(self, text: str) -> str:
        """Return the text that the process that leads has given."""
        told = torch.tensor(list(text.encode()), dtype=torch.uint8)
        told.resize_(self.number_from_leader(len(told)))
        self.from_leader([told])
        return bytes(told.tolist()).decode()

    def led(self, work: Callable[[], T]) -> T | None:
        """Let the process that leads do something alone, and return its result there, None elsewhere.

        Raises:
            UserError, OSError: in the process that leads. The others leave quietly: what went wrong is told
                once.
        """
        result: T | None = None
        failure: Exception | None = None
        if self.leads:
            try:
                result = work()
            except (UserError, OSError) as error:
                failure = error
        failed = self.any_of(failure is not None)
        if failure:
            raise failure
        if failed:
            raise SystemExit(0)
        return result

    def wait(self) -> None:
        """Return when every process is here."""
        self.any_of(False)


def _tree_sum(parameters: Sequence[nn.Parameter], first: int, leaves: int, leaf: Leaf) -> Tensor:
    """Add the gradients of leaves in a binary tree: halves of a power of two are subtrees of the whole."""
    if leaves == 1:
        return leaf(first)
    half = leaves // 2
    loss = _tree_sum(parameters, first, half, leaf)
    left = [cast(Tensor, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = loss + _tree_sum(parameters, first + half, leaves - half, leaf)
    for parameter, grad in zip(parameters, left, strict=True):
        parameter.grad = grad.add_(cast(Tensor, parameter.grad))
    return loss


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have the embeddings, the head and the last norm of a spread model at hand; the others always have."""
    if not hasattr(model, "unshard"):
        yield
        return
    spread: Any = model  # torch's FSDPModule, which only mode fsdp loads
    spread.unshard()
    try:
        yield
    finally:
        spread.reshard()


@contextmanager
def _peers(*, all_errors: bool = True) -> Iterator[None]:
    """Turn the loss of another process into one sentence; torch tells it by RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        if not (all_errors or isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        told = str(error).splitlines()[0][:160]
        raise PeerLost(
            "another process of this training died or fell silent: under torchrun all are started again "
            f"from the last checkpoint; without it, run the same command again ({told})"
        ) from error


@contextmanager
def joined(launcher: Launcher, device: str) -> Iterator[Group]:
    """Join the processes that torchrun started beside this one, if it did.

    Args:
        launcher: of params.yaml; the number of processes is what torchrun says.
        device: `cpu`, `cuda` or `mps`.
    """
    place = own_place()
    if place.size == 1:
        yield Group(place, launcher.mode)
        return
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    with _peers():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=meeting_place(),
            rank=place.rank,
            world_size=place.size,
            timeout=datetime.timedelta(seconds=launcher.timeout_seconds),
        )
    try:
        with _peers(all_errors=False):  # a spread model meets the others wherever it works
            yield Group(place, launcher.mode)
    except PeerLost:  # a broken group can't be left in good order, and the process ends anyway
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
