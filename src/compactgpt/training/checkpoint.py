"""Models and training states on disk: safetensors and JSON, complete or absent, verified when read.

A model is a folder with `model.safetensors` and `config.json`. A training state is a folder
`step-00000200` with `model.safetensors`, `optimizer.safetensors` and `progress.json`; all states of one
run lie in one folder, named by the run's key. Both are made by storage.atomic_folder. The state of a model
that is spread over processes has a safetensors file of each instead of the two (the room `sharding`).
"""

import json
import logging
import shutil
from collections.abc import Mapping
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
from compactgpt.training.optim import Optimizers

STATE = "training state"  # kind of folder, in its manifest
KEPT_STATES = 2
KEPT_RUNS = 2  # unfinished runs beside the present one: whoever turns a number back goes on with its run
_TYPES = {torch.float32: "F32"}  # of what we write, as safetensors calls them
log = logging.getLogger(__name__)


def save_model(
    model: GPT, folder: Path, facts: Mapping[str, Any], best: Path | None = None, *, private: bool = False
) -> None:
    """Write a model: its tensors, its shape, and what else is worth knowing of it.

    Args:
        model: on any device.
        folder: new, empty, or an earlier model, which is replaced as a whole.
        facts: JSON values, kept in config.json beside the shape.
        best: folder of another model of the same run, to be kept inside as `best`.
        private: see `storage.atomic_folder`.

    Raises:
        NotAllowed: the folder has other files.
        MissingInput, BadData: the other model is missing or was altered.
    """
    if best:
        verified_manifest(best)
    made = atomic_folder(folder, {"format": "compactgpt-model-1"}, kind="model", private=private)
    with made as temporary:
        _write_tensors(temporary / "model.safetensors", model.state_dict())
        config = {"model": model.shape.model_dump(mode="json"), "facts": dict(facts)}
        write_json(temporary / "config.json", config)
        if best:
            shutil.copytree(best, temporary / "best")


def load_model(folder: Path, device: str = "cpu") -> GPT:
    """Read a model that `save_model` wrote, ready for evaluation.

    Raises:
        MissingInput: there is none.
        BadData: a file was altered, the shape is impossible, or a tensor is missing, unknown, of another
            shape or type, or not finite.
    """
    verified_manifest(folder)
    try:
        shape = Model.model_validate_json(json.dumps(read_json(folder / "config.json")["model"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise BadData(f"{folder / 'config.json'} describes no model: run `dvc repro -f training`") from error
    check_size(shape, folder / "model.safetensors")
    model = GPT(shape)
    tensors = _read_tensors(folder / "model.safetensors")
    _check_like(tensors, model.state_dict(), folder / "model.safetensors")
    model.load_state_dict(tensors)
    return model.to(device).eval()


def save_state(
    folder: Path, run_key: str, step: int, model: GPT, optimizers: Optimizers, progress: Mapping[str, Any]
) -> None:
    """Write the state after `step` updates, then drop all but the newest KEPT_STATES.

    Args:
        folder: of the run's states.
        run_key: what the run is a function of.
        step: updates made, at least one.
        model: its weights now.
        optimizers: their state now.
        progress: JSON values that training needs to go on.
    """
    own = {"run_key": run_key, "step": step}
    with atomic_folder(folder / f"step-{step:08d}", own, kind=STATE, private=True) as temporary:
        _write_tensors(temporary / "model.safetensors", model.state_dict())
        _write_tensors(temporary / "optimizer.safetensors", optimizers.state_tensors())
        write_json(temporary / "progress.json", progress)
    drop_old(folder)


def load_newest_state(
    folder: Path, run_key: str, model: GPT, optimizers: Optimizers
) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest state that is whole; name those that are not in the log and go past them.

    Returns:
        The updates made so far and what `save_state` was given as progress; None where there is no state,
        and then model and optimizers are as they were.
    """
    for state in swept_states(folder):
        try:
            return _load_state(state, run_key, model, optimizers)
        except (BadData, MissingInput) as error:
            pass_over(state, error)
    return None


def drop_states(folder: Path) -> None:
    """Remove a run's states, once its model is safe."""
    shutil.rmtree(folder, ignore_errors=True)


def prune_runs(folder: Path, key: str) -> None:
    """Remove the states of other runs, but for the KEPT_RUNS that were written last.

    Args:
        folder: holds a folder of states for each run, named by its key.
        key: of the present run, which stays.
    """
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != key]
    for old in sorted(others, key=lambda run: (run.stat().st_mtime_ns, run.name))[: -KEPT_RUNS or None]:
        log.info("the states of run %s are removed: it was left long ago", old.name)
        shutil.rmtree(old)


def checked_state(state: Path, run_key: str) -> tuple[int, dict[str, Any]]:
    """Step and progress of a state whose files are what was written, by this run."""
    try:
        manifest = verified_manifest(state)
        named = (manifest["kind"], manifest["run_key"], f"step-{manifest['step']:08d}")
        own = named == (STATE, run_key, state.name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadData(f"{state}: its manifest was altered") from error
    if not own:
        raise BadData(f"{state} belongs to another run")
    return manifest["step"], read_json(state / "progress.json")


def _load_state(state: Path, run_key: str, model: GPT, optimizers: Optimizers) -> tuple[int, dict[str, Any]]:
    """Check everything, then restore: a state that is refused changes nothing."""
    step, progress = checked_state(state, run_key)
    tensors = _read_tensors(state / "model.safetensors")
    _check_like(tensors, model.state_dict(), state / "model.safetensors")
    optimizers.load_state_tensors(_read_tensors(state / "optimizer.safetensors"))
    model.load_state_dict(tensors)
    return step, progress


def _states(folder: Path) -> list[Path]:
    """The states of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def swept_states(folder: Path) -> list[Path]:
    """The states of a run, newest first, after sweeping what a killed process left half-written."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    return _states(folder)[::-1]


def drop_old(folder: Path) -> None:
    """Remove all but the newest KEPT_STATES."""
    for old in _states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old)


def pass_over(state: Path, error: Exception) -> None:
    """Name a state that is not whole."""
    log.warning("training state %s is passed over: %s", state.name, error)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor after the other.

    The library's `save` holds all of it in memory, twice; its `save_file` meets a full disk with an error
    of its own, where an OSError is what storage turns into a sentence.
    """
    ordered = [(name, tensors[name].detach()) for name in sorted(tensors)]
    header = tensors_header((name, _TYPES[each.dtype], each.shape, each.nbytes) for name, each in ordered)
    with open(path, "wb") as file:
        file.write(header)
        file.writelines(each.cpu().contiguous().numpy().data for _, each in ordered)


def check_size(shape: Model, path: Path) -> None:
    """See that a file has a byte for each number of a shape, before memory is taken for them.

    Raises:
        BadData: it is too small, or missing.
    """
    rows = shape.block_size + shape.padded_vocab_size + 12 * shape.n_layer * shape.n_embd
    if not path.is_file() or path.stat().st_size < rows * shape.n_embd:
        raise BadData(f"{path} is missing, or too small for the shape that config.json beside it describes")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors and see that every one is finite."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadData(f"{path} is no safetensors file of ours: {error}") from error
    for name in broken:
        raise BadData(f"{path}: {name} holds numbers that are not finite")
    return tensors


def _check_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """See that names, shapes and types are those expected."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise BadData(f"{path}: {name} is missing")
        if name not in expected:
            raise BadData(f"{path}: {name} is unknown to this model")
        a, b = found[name], expected[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise BadData(f"{path}: {name} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
