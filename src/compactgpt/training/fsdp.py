"""Mode fsdp: FSDP2 (`fully_shard`) shards a model over processes, to train models larger than one device.

Each process holds some rows of every tensor. FSDP2 gathers the weights of a block when the block runs.
torch.distributed.checkpoint (DCP) writes training states as safetensors, one file for each process. Any
number of processes can resume from these files. DCP's default format is not used, because reading it may run
code. Only mode fsdp imports this module.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

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
from torch.distributed.tensor import DTensor, distribute_tensor

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.config import Model
from compactgpt.model.gpt import GPT
from compactgpt.training.distributed import Group


def shard_model(source: GPT | None, shape: Model, device: str, *, compiles: bool = False) -> GPT:
    """Return a sharded copy of a model: each process holds some rows of every tensor.

    Args:
        source: in the main process, the full model on the CPU; in other processes, None.
        shape: the model's shape.
        device: the device that holds the shards.
        compiles: whether to compile each block. FSDP2's gathering of weights is not compiled.
    """
    with torch.device("meta"):  # only the main process allocates the full model
        model = GPT(shape)
    if compiles:
        for block in model.h:
            block.compile()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients, do not average: the trainer has divided each loss by the number of micro-batches.
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
    """Return the full model on the CPU of the main process; other processes get a model without weights."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        full = GPT(model.shape)
    if is_main_process:
        full.load_state_dict(state, assign=True)
    return full


def orthogonalize_sharded(
    matrices: Sequence[Tensor], orthogonalize: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the orthogonalized form of sharded matrices.

    Newton-Schulz needs full matrices, so every process gathers each matrix and computes the whole result. The
    matrices are gathered one after the other, so that a process never holds two full matrices.

    Args:
        matrices: DTensors of one shape. (rows, columns)
        orthogonalize: a function of full matrices. (1, rows, columns) -> (1, rows, columns)
    """
    updates: list[Tensor] = []
    for matrix in cast(Sequence[DTensor], matrices):
        full = orthogonalize(matrix.full_tensor()[None])[0]
        # Every process has computed the full result and keeps its rows: no communication is needed.
        updates.append(distribute_tensor(full, matrix.device_mesh, matrix.placements, src_data_rank=None))
    return updates


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Write sharded tensors to a folder; each process writes its shards.

    Raises:
        OSError: a process could not write. Only the main process raises this error; the others exit.
        BadConfig: a process does not see the folder.
    """
    _check_shared(folder, group)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _no_warning_of_one_process():
            state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # every process raises it, but only one prints the message
        raise _cause(error) if group.is_main_process else SystemExit(0) from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Read sharded tensors that `write_shards` wrote with any number of processes.

    Each process reads its shards into `tensors`.

    Raises:
        BadConfig: a process does not see the folder.
    """
    _check_shared(folder, group)
    try:
        with _no_warning_of_one_process():
            state_dict_loader.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise _cause(error) from error


def check_shards(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a folder's tensors have the expected names and full shapes and are finite.

    DCP does not check this. The check needs the memory of one tensor.

    Raises:
        BadData: a tensor is missing, is unknown, has another shape, or is not finite, or a file is damaged.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = {name: tuple(cast(TensorStorageMetadata, entry).size) for name, entry in metadata.items()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise BadData(f"{folder}: {name} is {found.get(name)}, not {expected.get(name)}")
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise BadData(f"{path}: {name} holds numbers that are not finite")
    except (SafetensorError, OSError) as error:
        raise BadData(f"{folder} has a file that is not a valid safetensors file: {error}") from error


def _no_warning_of_one_process() -> warnings.catch_warnings:
    """Return a context that hides DCP's warning about reading or writing with a single process."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _cause(error: CheckpointException) -> Exception:
    """Return the OSError of the first process that raised one; without any, the first process's error."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items()) if isinstance(cause, Exception)]
    causes.sort(key=lambda cause: not isinstance(cause, OSError))
    return causes[0] if causes else RuntimeError(error)


def _check_shared(folder: Path, group: Group) -> None:
    """Raise BadConfig if a process does not see the folder."""
    if group.any_rank(not folder.is_dir()):
        raise BadConfig(
            f"training.launcher.mode: fsdp needs {folder.parent} on a disk that all nodes share, but a node "
            "does not see the files that process 0 writes there: use a shared disk, or set mode to fast"
        )
