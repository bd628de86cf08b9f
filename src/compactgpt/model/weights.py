"""Save and load models: folders with `model.safetensors` and `config.json`, verified when read."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compactgpt.common.errors import BadData, DiskFull, MissingInput
from compactgpt.common.storage import atomic_folder, read_json, verified_manifest, write_json
from compactgpt.config import Model
from compactgpt.model.gpt import GPT

Tensors = Mapping[str, Tensor]
WEIGHTS = "model.safetensors"


def save_model(model: GPT, folder: Path, best: Path | None = None, *, force: bool = False) -> None:
    """Write the weights and the shape of a model to `folder`.

    `best`, the folder of the training's best model, is copied to `folder`/best. Raises NotAllowed if a file
    of `folder` was added or changed since the last save, unless `force` is true.
    """
    if best:  # raise an error for a damaged `best` before any file is written
        verified_manifest(best)
    with atomic_folder(folder, {"format": "compactgpt-model-1"}, kind="model", force=force) as temporary:
        write_tensors(temporary / WEIGHTS, model.state_dict())
        write_json(temporary / "config.json", {"model": model.shape.model_dump(mode="json")})
        if best:
            shutil.copytree(best, temporary / "best")


def load_model(folder: Path, device: str = "cpu") -> GPT:
    """Load a model that `save_model` wrote, in evaluation mode.

    Raises MissingInput if `folder` has no manifest, and BadData if a file is missing or damaged.
    """
    verified_manifest(folder)
    try:
        # Pass JSON text: in strict mode, pydantic converts a list to a tuple only if the input is JSON text.
        shape = Model.model_validate_json(json.dumps(read_json(folder / "config.json")["model"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise BadData(
            f"{folder / 'config.json'} does not describe a model: run `dvc repro -f training`"
        ) from error
    return load_gpt(folder / WEIGHTS, shape).to(device)


def load_gpt(
    path: Path, shape: Model, convert: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> GPT:
    """Load a GPT from a safetensors file, in evaluation mode on the CPU.

    `convert` gives tensors the names and layout of `GPT`. Raises BadData if the results do not fit `shape`.
    """
    # Check the file's size before building the model: a wrong config.json could describe a huge model.
    rows = shape.block_size + shape.padded_vocab_size + 12 * shape.n_layer * shape.n_embd
    if path.is_file() and path.stat().st_size < rows * shape.n_embd:
        raise BadData(f"{path} is too small for the shape in the config.json of its folder")
    tensors = convert(read_tensors(path))
    model = GPT(shape)
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Raises MissingInput for a missing file, and BadData for a damaged file or a number that is not finite.
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
    """Raise BadData, which names `path`, if `found` and `expected` differ in a name, shape or dtype."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise BadData(f"{path}: {name} is missing")
        if name not in expected:
            raise BadData(f"{path}: {name} is unknown: the model has no such tensor")
        a, b = found[name], expected[name]
        # Without this check, torch would broadcast a shape and convert a dtype silently.
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise BadData(f"{path}: {name} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors to a safetensors file; raise DiskFull if the disk is full."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # safetensors raises no OSError when the disk is full
        raise DiskFull(
            f"{path} can't be written: free some space and run the command again ({error})"
        ) from error
