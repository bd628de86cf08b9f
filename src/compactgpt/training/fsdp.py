"""Mode fsdp: FSDP2 (`fully_shard`) shards a model over processes, so that one larger than any device trains.

Each process holds its rows of every tensor; a block's weights are gathered when it works. torch's distributed
checkpoints (DCP) write training states as safetensors, one file of each process, and any number of processes
resumes from them. Reading these runs no code, as reading DCP's default format may. Only mode fsdp imports
this module.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.storage import atomic_folder, write_json
from compactgpt.config import Model
from compactgpt.model.gpt import GPT
from compactgpt.training.checkpoint import STATE, checked_state, drop_old, pass_over, swept_states
from compactgpt.training.distributed import Group


def shard_model(source: GPT | None, shape: Model, device: str, *, compiles: bool = False) -> GPT:
    """Build a model of which each process holds its rows of every tensor.

    Args:
        source: the full model on the CPU of the main process, None elsewhere.
        shape: of the model.
        device: of the shards.
        compiles: each block, since what gathers its weights can't be compiled with it.
    """
    with torch.device("meta"):
        model = GPT(shape)
    if compiles:
        for block in model.h:
            block.compile()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a micro-batch's loss is its share of the mean already: only add
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    full = source.state_dict() if source else {}
    set_model_state_dict(
        model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    return model


def full_model(model: GPT, is_main_process: bool) -> GPT:
    """Gather a sharded model on the CPU of the main process; elsewhere, return a model without weights."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        full = GPT(model.shape)
    if is_main_process:
        full.load_state_dict(state, assign=True)
    return full


def orthogonalise_sharded(
    matrices: Sequence[Tensor], orthogonalise: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Orthogonalise sharded matrices of one shape, a different one on each process at a time.

    Newton-Schulz needs a full matrix. torch.optim.Muon on sharded ones does eleven all-reduces a matrix; here
    the rows of as many matrices as there are processes are exchanged twice, in bfloat16, with which
    Newton-Schulz begins anyway.

    Args:
        matrices: DTensors. (rows, columns)
        orthogonalise: of full ones. (1, rows, columns) -> (1, rows, columns)
    """
    size = cast(DTensor, matrices[0]).device_mesh.size()
    updates: list[Tensor] = []
    for start in range(0, len(matrices), size):
        updates += _one_on_each(cast(list[DTensor], matrices[start : start + size]), orthogonalise)
    return updates


def _one_on_each(matrices: Sequence[DTensor], orthogonalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Orthogonalise at most as many matrices as there are processes."""
    mesh, placements = matrices[0].device_mesh, matrices[0].placements
    (rows, columns), size, group = matrices[0].shape, mesh.size(), mesh.get_group()
    own = matrices[0].to_local()
    each = math.ceil(rows / size)  # rows of a process, as torch.chunk deals them; the last may have fewer
    sent = torch.zeros(size, each, columns, dtype=torch.bfloat16, device=own.device)
    for shard, matrix in zip(sent, matrices, strict=False):
        shard[: len(own)] = matrix.to_local()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    full = received.view(size * each, columns)[:rows]
    if mesh.get_rank() < len(matrices):
        full.copy_(orthogonalise(full[None])[0])
    dist.all_to_all_single(sent, received, group=group)
    return [
        DTensor.from_local(
            shard[: len(own)].clone(),
            mesh,
            placements,
            run_check=False,
            shape=torch.Size((rows, columns)),
            stride=(columns, 1),
        )
        for shard in sent[: len(matrices)]
    ]


def save_sharded_state(
    folder: Path,
    run_key: str,
    step: int,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    group: Group,
) -> None:
    """Write the training state after `step` updates of a sharded model; all processes call this.

    Args:
        folder: of the run's states, the same for all processes.
        run_key: hash of what the run is a function of.
        step: updates made, at least one.
        tensors: weights and the optimizers' state, by distinct names.
        progress: JSON values that training needs to resume; of the main process.
        group: the processes.

    Raises:
        OSError: the disk of one of the processes refused.
    """
    with ExitStack() as opened:
        facts = {"run_key": run_key, "step": step}
        state = atomic_folder(folder / f"step-{step:08d}", facts, kind=STATE, private=True)
        created = group.run_on_main(lambda: opened.enter_context(state))
        temporary = folder / group.broadcast_text(created.name if created else "")
        _check_shared(temporary, group)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        try:
            state_dict_saver.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            # All processes raise it: one shows the message.
            raise _cause(error) if group.is_main_process else SystemExit(0) from error
        group.run_on_main(lambda: write_json(temporary / "progress.json", progress))
        group.run_on_main(opened.close)
    group.run_on_main(lambda: drop_old(folder))


def load_newest_sharded_state(
    folder: Path, run_key: str, tensors: Mapping[str, Tensor], group: Group
) -> tuple[int, dict[str, Any]] | None:
    """Fill tensors from the newest complete state, however many processes wrote it; all processes call this.

    Returns:
        The updates made so far and, in the main process, what was saved as progress; None where
        there is no state, and then the tensors are as they were.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = group.run_on_main(lambda: _newest_state(folder, run_key, shapes))
    name = group.broadcast_text(found[0] if found else "")
    if not name:
        return None
    _check_shared(folder / name, group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone
        try:
            state_dict_loader.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder / name)))
        except CheckpointException as error:
            raise _cause(error) from error
    return int(name.removeprefix("step-")), found[1] if found else {}


def _cause(error: CheckpointException) -> Exception:
    """Return what the first process met, OSErrors before others."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items()) if isinstance(cause, Exception)]
    causes.sort(key=lambda cause: not isinstance(cause, OSError))
    return causes[0] if causes else RuntimeError(error)


def _newest_state(
    folder: Path, run_key: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Any]] | None:
    """Return name and progress of the newest complete state of tensors of these shapes."""
    for state in swept_states(folder):
        try:
            _, progress = checked_state(state, run_key)
            _check_tensors(state, shapes)
        except (BadData, MissingInput) as error:
            pass_over(state, error)
        else:
            return state.name, progress
    return None


def _check_tensors(state: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, full shapes and finiteness of a state's tensors, in bounded memory; DCP checks none."""
    try:
        metadata = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
        found = {name: tuple(cast(TensorStorageMetadata, entry).size) for name, entry in metadata.items()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise BadData(f"{state}: {name} is {found.get(name)}, not {expected.get(name)}")
        for path in sorted(state.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise BadData(f"{path}: {name} holds numbers that are not finite")
    except (SafetensorError, OSError) as error:
        raise BadData(f"{state} holds a file that is not a safetensors file: {error}") from error


def _check_shared(path: Path, group: Group) -> None:
    """Refuse a folder that not all processes see."""

    def refuse() -> None:
        if unseen:
            raise BadConfig(
                f"training.launcher.mode: fsdp needs {path.parent} on a disk that all nodes share: a node "
                "does not see what process 0 sees there"
            )

    unseen = group.any_rank(not path.is_dir())
    group.run_on_main(refuse)
