"""Mode fsdp: FSDP2 (`fully_shard`) shards a model over processes, so that one larger than any device trains.

Each process holds its rows of every tensor; a block's weights are gathered when it works. torch's distributed
checkpoints (DCP) write training states as safetensors, one file of each process, and any number of processes
resumes from them. Reading these runs no code, as reading DCP's default format may. Only mode fsdp imports
this module.
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
    """Build a model of which each process holds its rows of every tensor.

    Args:
        source: the full model on the CPU of the main process, None elsewhere.
        shape: of the model.
        device: of the shards.
        compiles: compile each block; the gathering of its weights can't be compiled with it.
    """
    with torch.device("meta"):  # no process but the main one allocates the full model
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
            # A micro-batch's loss is already divided by the number of micro-batches of all processes.
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


def orthogonalize_sharded(
    matrices: Sequence[Tensor], orthogonalize: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Orthogonalize sharded matrices of one shape; each process computes on the full matrix.

    Newton-Schulz needs full matrices. One at a time, so that no process ever holds two of them.

    Args:
        matrices: DTensors. (rows, columns)
        orthogonalize: of full ones. (1, rows, columns) -> (1, rows, columns)
    """
    updates: list[Tensor] = []
    for matrix in cast(Sequence[DTensor], matrices):
        full = orthogonalize(matrix.full_tensor()[None])[0]
        # every process has the same result and keeps its rows of it: nothing is sent
        updates.append(distribute_tensor(full, matrix.device_mesh, matrix.placements, src_data_rank=None))
    return updates


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Write tensors, each process its part.

    Raises:
        OSError: of the first process whose disk refused, in the main process; the others exit.
        BadConfig: not all processes see the folder.
    """
    _check_shared(folder, group)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _no_warning_of_one_process():
            state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # every process raises it: one prints the message
        raise _cause(error) if group.is_main_process else SystemExit(0) from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Fill tensors, each process its part, from what any number of processes wrote.

    Raises:
        BadConfig: not all processes see the folder.
    """
    _check_shared(folder, group)
    try:
        with _no_warning_of_one_process():
            state_dict_loader.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise _cause(error) from error


def check_shards(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, full shapes and finiteness of tensors, in bounded memory; DCP checks none of them.

    Raises:
        BadData: a tensor is missing, unknown, of another shape, or not finite.
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
    """Hide DCP's warning that one process alone reads or writes."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _cause(error: CheckpointException) -> Exception:
    """Return the error of the first process that failed, OSErrors before others."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items()) if isinstance(cause, Exception)]
    causes.sort(key=lambda cause: not isinstance(cause, OSError))
    return causes[0] if causes else RuntimeError(error)


def _check_shared(folder: Path, group: Group) -> None:
    """Refuse a folder that not all processes see."""
    if group.any_rank(not folder.is_dir()):
        raise BadConfig(
            f"training.launcher.mode: fsdp needs {folder.parent} on a disk that all nodes share: a node "
            "does not see what process 0 sees there"
        )
