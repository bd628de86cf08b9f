"""Save and load training states: atomic writes of safetensors and JSON, verified when read.

A state is a folder such as `step-00000200`. It has `progress.json` and the tensors of the model and the
optimizers. The tensors are in `state.safetensors`; in mode fsdp each process writes a file of its own. All
states of a run are in one folder, whose name is the run key.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import atomic_folder, read_json, verified_manifest, write_json
from compactgpt.model.weights import check_tensors, read_tensors, write_tensors
from compactgpt.training.distributed import Group

STATE_KIND = "training state"  # in a state's manifest
KEPT_STATES = 2
# Unfinished runs to keep besides the current one. A user who restores an old setting resumes that run.
KEPT_RUNS = 2
TENSORS, PROGRESS = "state.safetensors", "progress.json"
log = logging.getLogger(__name__)


def save_state(
    folder: Path,
    run_key: str,
    step: int,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    group: Group = Group(),  # noqa: B008  it never changes
) -> None:
    """Write a training state, then remove all states of the run except the newest KEPT_STATES.

    All processes call this function. The main process writes the tensors; in mode fsdp each process writes
    its shards.

    Args:
        folder: the folder of the run's states.
        run_key: the run key that `trainer.run_key` returns.
        step: the number of updates made so far, at least 1.
        tensors: the tensors of the model and the optimizers, by unique names.
        progress: JSON values that training needs to resume.
        group: the processes that train the model.
    """
    facts = {"run_key": run_key, "step": step}
    state = atomic_folder(folder / f"step-{step:08d}", facts, kind=STATE_KIND, private=True)
    with ExitStack() as stack:
        temporary = folder / group.run_on_main(lambda: stack.enter_context(state).name)
        if group.mode == "fsdp":
            from compactgpt.training.fsdp import write_shards

            write_shards(temporary, tensors, group)
        else:
            group.run_on_main(lambda: write_tensors(temporary / TENSORS, tensors))
        group.run_on_main(lambda: write_json(temporary / PROGRESS, progress))
        group.run_on_main(stack.close)  # renames the complete state to its final name
    group.run_on_main(lambda: _remove_old_states(folder))


def load_newest_state(
    folder: Path,
    run_key: str,
    tensors: Mapping[str, Tensor],
    group: Group = Group(),  # noqa: B008  it never changes
) -> tuple[int, dict[str, Any]] | None:
    """Read the newest valid training state into `tensors`, and log a warning for each invalid state.

    Any number of processes may have written the state. All processes call this function. The main process
    reads the file and broadcasts the tensors, because other nodes may not see the folder. In mode fsdp each
    process reads its shards.

    Returns:
        The step and the progress that `save_state` wrote. None if no state is valid; `tensors` is unchanged.
    """
    found = group.run_on_main(lambda: _find_newest_state(folder, run_key, tensors, group.mode))
    if found is None:
        return None
    step, progress = found
    if group.mode == "fsdp":
        from compactgpt.training.fsdp import read_shards

        read_shards(folder / f"step-{step:08d}", tensors, group)
    else:
        group.broadcast(list(tensors.values()))
    return step, progress


def _find_newest_state(
    folder: Path, run_key: str, tensors: Mapping[str, Tensor], mode: str
) -> tuple[int, dict[str, Any]] | None:
    """Return the step and the progress of the newest valid state; read its tensors unless mode is fsdp."""
    for unfinished in folder.glob(".step-*"):  # an incomplete state of a process that was killed
        shutil.rmtree(unfinished)
    for state in _states(folder)[::-1]:
        try:
            found = _check_manifest(state, run_key)
            if mode == "fsdp":
                from compactgpt.training.fsdp import check_shards

                check_shards(state, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
            else:
                _fill_tensors(tensors, state / TENSORS)
        except (BadData, MissingInput) as error:
            log.warning("training state %s is skipped: %s", state.name, error)
        else:
            return found
    return None


def _check_manifest(state: Path, run_key: str) -> tuple[int, dict[str, Any]]:
    """Check that a state's files are unchanged and belong to this run; return its step and progress."""
    try:
        manifest = verified_manifest(state)
        names = (manifest["kind"], manifest["run_key"], f"step-{manifest['step']:08d}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadData(f"{state}: its manifest was changed") from error
    if names != (STATE_KIND, run_key, state.name):
        raise BadData(f"{state} belongs to another run")
    return manifest["step"], read_json(state / PROGRESS)


@torch.no_grad()
def _fill_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read a file into `tensors`, after checking that the file fits all of them."""
    found = read_tensors(path)
    check_tensors(found, tensors, path)
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def remove_states(folder: Path) -> None:
    """Remove all training states of a run; call this after the model is saved."""
    shutil.rmtree(folder, ignore_errors=True)


def prune_runs(folder: Path, key: str) -> None:
    """Remove the training states of other runs, except the KEPT_RUNS most recent of them.

    Args:
        folder: the folder that contains one folder of states for each run, named by the run key.
        key: the key of the current run, whose states are kept.
    """
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != key]
    for old in sorted(others, key=lambda run: (run.stat().st_mtime_ns, run.name))[: -KEPT_RUNS or None]:
        log.info("removing the training states of run %s: newer unfinished runs exist", old.name)
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    """Return the states of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def _remove_old_states(folder: Path) -> None:
    for old in _states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old)
