"""Shard a model over several processes with FSDP2 (`fully_shard`).

Each process holds some rows of every tensor; FSDP2 gathers a block's weights when the block runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from compactgpt.config import Model
from compactgpt.model.gpt import GPT
from compactgpt.training.distributed import Group


def shard_model(
    full: Mapping[str, Tensor], shape: Model, device: str, group: Group, *, compiles: bool = False
) -> GPT:
    """Return a model on `device`, sharded over the processes of `group`.

    `full` has the full weights by name; other processes than the main process may pass an empty dict.
    """
    with torch.device("meta"):  # allocates no memory: `scatter` below fills in the weights
        model = GPT(shape)
    mesh = init_device_mesh(device, (group.world_size,))
    for block in model.h:
        if compiles:  # compile each block alone: FSDP2's all-gather before a block is never compiled
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The trainer has already divided each loss by the number of micro-batches of all processes.
            module.set_gradient_divide_factor(1.0)  # so FSDP2 must sum gradients instead of averaging them
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    group.scatter(full, model.state_dict())
    return model


def orthogonalize_sharded(
    matrices: Sequence[Tensor], orthogonalize: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `orthogonalize` to each full matrix, and return the results, sharded like the matrices.

    Every process gathers one full matrix at a time, and orthogonalizes all of its rows.
    """
    updates: list[Tensor] = []
    for matrix in cast(Sequence[DTensor], matrices):
        full = orthogonalize(matrix.full_tensor()[None])[0]  # (rows, columns)
        # Every process keeps its rows of the full result, without communication.
        updates.append(distribute_tensor(full, matrix.device_mesh, matrix.placements, src_data_rank=None))
    return updates
