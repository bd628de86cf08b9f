"""Models on disk: folders with `model.safetensors` and `config.json`, verified when read."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import atomic_folder, read_json, tensors_header, verified_manifest, write_json
from compactgpt.config import Model
from compactgpt.model.gpt import GPT

Tensors = Mapping[str, Tensor]
WEIGHTS = "model.safetensors"


def save_model(
    model: GPT, folder: Path, facts: Mapping[str, Any], best: Path | None = None, *, private: bool = False
) -> None:
    """Write a model's tensors and its config.json.

    Args:
        model: on any device.
        folder: new, empty, or an earlier model, which is replaced.
        facts: JSON values for config.json, next to the model's shape.
        best: folder of another model of the same run, to be copied into `folder`/best.
        private: see `storage.atomic_folder`.

    Raises:
        NotAllowed: the folder has other files.
        MissingInput, BadData: the other model is missing or was changed.
    """
    if best:
        verified_manifest(best)
    with atomic_folder(folder, {"format": "compactgpt-model-1"}, kind="model", private=private) as temporary:
        write_tensors(temporary / WEIGHTS, model.state_dict())
        config = {"model": model.shape.model_dump(mode="json"), "facts": dict(facts)}
        write_json(temporary / "config.json", config)
        if best:
            shutil.copytree(best, temporary / "best")


def load_model(folder: Path, device: str = "cpu") -> GPT:
    """Read a model that `save_model` wrote, in evaluation mode.

    Raises:
        MissingInput: it is missing.
        BadData: a file was changed, the shape is impossible, or a tensor is missing, unknown, of another
            shape or type, or not finite.
    """
    verified_manifest(folder)
    try:
        shape = Model.model_validate_json(json.dumps(read_json(folder / "config.json")["model"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise BadData(
            f"{folder / 'config.json'} does not describe a model: run `dvc repro -f training`"
        ) from error
    return load_gpt(folder / WEIGHTS, shape).to(device)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MissingInput: it is missing.
        BadData: it is damaged, or a number in it is NaN or infinite.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadData(f"{path} is not a valid safetensors file: {error}") from error
    if broken:
        raise BadData(f"{path}: {broken[0]} holds numbers that are not finite")
    return tensors


def check_tensors(found: Tensors, expected: Tensors, path: Path) -> None:
    """Compare names, shapes and types of tensors.

    Raises:
        BadData: one differs.
    """
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise BadData(f"{path}: {name} is missing")
        if name not in expected:
            raise BadData(f"{path}: {name} is unknown to this model")
        a, b = found[name], expected[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise BadData(f"{path}: {name} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")


def load_gpt(
    path: Path, shape: Model, convert: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> GPT:
    """Read a GPT of a shape from a safetensors file, in evaluation mode on the CPU.

    Args:
        path: the file.
        shape: as the config.json next to it describes it.
        convert: turns the file's tensors into those of our GPT.

    Raises:
        MissingInput: the file is missing.
        BadData: it is damaged, or a tensor is missing, unknown, of another shape or type, or not finite.
    """
    # Before memory is allocated for a shape, the file must have at least a byte for each of its numbers.
    rows = shape.block_size + shape.padded_vocab_size + 12 * shape.n_layer * shape.n_embd
    if path.is_file() and path.stat().st_size < rows * shape.n_embd:
        raise BadData(f"{path} is too small for the shape in its config.json")
    tensors = convert(read_tensors(path))
    model = GPT(shape)
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors)
    return model.eval()


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file of float32 tensors, one after the other.

    The library's `save` copies all of them in memory first. Its `save_file` raises an error of its own on a
    full disk, not the OSError that `storage` turns into a message.
    """
    ordered = [(name, tensors[name].detach()) for name in sorted(tensors)]
    header = tensors_header((name, "F32", tensor.shape, tensor.nbytes) for name, tensor in ordered)
    with open(path, "wb") as file:
        file.write(header)
        file.writelines(tensor.cpu().contiguous().numpy().data for _, tensor in ordered)
