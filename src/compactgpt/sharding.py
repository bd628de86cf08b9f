"""A model spread over processes: mode fsdp, which holds and trains what fits no single device.

torch's FSDP2 (`fully_shard`) gives each process its share of every tensor's rows, gathers a block's weights
when the block works and adds up their gradients where the rows live. Only mode fsdp loads this room.

States are written by torch's distributed checkpoints as safetensors, each process its own rows, and read
by any number of processes; reading one runs no code, as reading DCP's usual files may.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from compactgpt.checkpoint import STATE, checked_state, drop_old, pass_over, swept_states
from compactgpt.config import Model
from compactgpt.distributed import Group
from compactgpt.errors import BadConfig, BadData, MissingInput
from compactgpt.model import GPT
from compactgpt.storage import atomic_folder, write_json


def spread(source: GPT | None, shape: Model, device: str, *, compiles: bool = False) -> GPT:
    """Build a model whose tensors lie on all processes, each with its rows of every one.

    Args:
        source: the whole model on the CPU of process 0, None elsewhere.
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
        if isinstance(module, FSDPModule):  # a leaf's loss is its share of the mean already: only add
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    whole = dict(source.named_parameters()) if source else {}
    for name, parameter in model.named_parameters():
        own = cast(DTensor, parameter.data)
        full = whole[name].detach().to(device) if source else torch.empty(own.shape, device=device)
        own.to_local().copy_(distribute_tensor(full, mesh, own.placements).to_local())
    return model


def whole_model(model: GPT, leads: bool) -> GPT:
    """Gather a spread model on the CPU of process 0, tensor by tensor; elsewhere a model without weights."""
    with torch.device("meta"):
        whole = GPT(model.shape)
    if leads:
        whole.to_empty(device="cpu")
    target = whole.state_dict()
    for name, tensor in model.state_dict().items():
        full = cast(DTensor, tensor).full_tensor()
        if leads:
            target[name].copy_(full)
    return whole


def in_turns(matrices: Sequence[Tensor], orthogonalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Orthogonalise spread matrices of one shape, each whole on one process only, in as many at a time.

    Newton-Schulz needs a whole matrix. torch.optim.Muon on spread ones adds up over all processes eleven
    times a matrix; here rows go to the matrix's process and come back, two exchanges for as many matrices as
    there are processes. In bfloat16, which Newton-Schulz begins with anyway.

    Args:
        matrices: DTensors. (rows, columns)
        orthogonalise: of whole ones. (1, rows, columns) -> (1, rows, columns)
    """
    size = cast(DTensor, matrices[0]).device_mesh.size()
    updates: list[Tensor] = []
    for start in range(0, len(matrices), size):
        updates += _one_turn(cast(list[DTensor], matrices[start : start + size]), orthogonalise)
    return updates


def _one_turn(matrices: Sequence[DTensor], orthogonalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Orthogonalise one matrix on each process."""
    mesh, placements = matrices[0].device_mesh, matrices[0].placements
    (rows, columns), size, group = matrices[0].shape, mesh.size(), mesh.get_group()
    own = matrices[0].to_local()
    each = math.ceil(rows / size)  # rows of a process, as torch.chunk deals them; the last may have fewer
    sent = torch.zeros(size, each, columns, dtype=torch.bfloat16, device=own.device)
    for shard, matrix in zip(sent, matrices, strict=False):
        shard[: len(own)] = matrix.to_local()
    met = torch.empty_like(sent)
    dist.all_to_all_single(met, sent, group=group)
    whole = met.view(size * each, columns)[:rows]
    if mesh.get_rank() < len(matrices):
        whole.copy_(orthogonalise(whole[None])[0])
    dist.all_to_all_single(sent, met, group=group)
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


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a folder, each process its own rows; all processes call this.

    Raises:
        OSError: the disk of one of the processes refused.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _cause(error) from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, spread or whole, from the safetensors files of a folder, however those are cut."""
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone
        try:
            state_dict_loader.load(dict(tensors), storage_reader=reader)
        except CheckpointException as error:
            raise _cause(error) from error


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each whole tensor that the safetensors files of a folder hold together."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(cast(TensorStorageMetadata, entry).size) for name, entry in found.items()}


def _cause(error: CheckpointException) -> Exception:
    """What the first process met."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items()) if isinstance(cause, Exception)]
    return next(
        (cause for cause in causes if isinstance(cause, OSError)), (causes or [RuntimeError(error)])[0]
    )


def save_shards(
    folder: Path,
    run_key: str,
    step: int,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    group: Group,
) -> None:
    """Write the state after `step` updates of a model that is spread over processes; all of them call this.

    Args:
        folder: of the run's states, the same for all processes.
        run_key: what the run is a function of.
        step: updates made, at least one.
        tensors: weights and the optimizers' state, by names that differ.
        progress: JSON values that training needs to go on; of the process that leads.
        group: the processes.
    """
    with ExitStack() as opened:
        own = {"run_key": run_key, "step": step}
        whole = atomic_folder(folder / f"step-{step:08d}", own, kind=STATE, private=True)
        made = group.led(lambda: opened.enter_context(whole))
        temporary = folder / group.text_from_leader(made.name if made else "")
        _see_shared(temporary, group)
        try:
            write_shards(temporary, tensors)
        except OSError as error:
            raise error if group.leads else SystemExit(0) from error  # what went wrong is told once
        group.led(lambda: write_json(temporary / "progress.json", progress))
        group.led(opened.close)
    group.led(lambda: drop_old(folder))


def load_newest_shards(
    folder: Path, run_key: str, tensors: Mapping[str, Tensor], group: Group
) -> tuple[int, dict[str, Any]] | None:
    """Fill tensors from the newest state that is whole, however many processes wrote it; all call this.

    Returns:
        The updates made so far and, in the process that leads, what was saved as progress; None where
        there is no state, and then the tensors are as they were.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = group.led(lambda: _newest_shards(folder, run_key, shapes))
    name = group.text_from_leader(found[0] if found else "")
    if not name:
        return None
    _see_shared(folder / name, group)
    read_shards(folder / name, tensors)
    return int(name.removeprefix("step-")), found[1] if found else {}


def _newest_shards(
    folder: Path, run_key: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Any]] | None:
    """Name and progress of the newest whole state of tensors of these shapes."""
    for state in swept_states(folder):
        try:
            _, progress = checked_state(state, run_key)
            _check_shards(state, shapes)
        except (BadData, MissingInput) as error:
            pass_over(state, error)
        else:
            return state.name, progress
    return None


def _check_shards(state: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """See that a state's files hold these tensors together and only finite numbers, in bounded memory."""
    try:
        found = shapes_in(state)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise BadData(f"{state}: {name} is {found.get(name)}, not {expected.get(name)}")
        for path in sorted(state.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise BadData(f"{path}: {name} holds numbers that are not finite")
    except (SafetensorError, OSError) as error:
        raise BadData(f"{state} holds a file that is no safetensors file: {error}") from error


def _see_shared(path: Path, group: Group) -> None:
    """Refuse to work on a folder that not all processes see."""

    def refuse() -> None:
        if unseen:
            raise BadConfig(
                f"training.launcher.mode: fsdp needs {path.parent} on a disk that all nodes share: there is "
                "one that does not see what process 0 sees there"
            )

    unseen = group.any_of(not path.is_dir())
    group.led(refuse)
