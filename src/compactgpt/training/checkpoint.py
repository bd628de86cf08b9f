"""Training states on disk: safetensors and JSON, complete or absent, verified when read.

A state is a folder `step-00000200` with `progress.json` and the tensors of model and optimizers: in
`state.safetensors`, or in mode fsdp in a file of each process. The states of one run are in one folder, named
by the run's key.
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
KEPT_RUNS = 2  # unfinished runs besides the current one: a user who restores an old setting resumes its run
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
    """Write the training state after `step` updates, then remove all but the newest KEPT_STATES.

    All processes call this. The main process writes; in mode fsdp each process writes its part.

    Args:
        folder: of the run's states.
        run_key: hash of all that the run depends on.
        step: updates made, at least one.
        tensors: of model and optimizers, by distinct names.
        progress: JSON values that training needs to resume.
        group: the processes.
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
        group.run_on_main(stack.close)  # the state is complete and gets its name
    group.run_on_main(lambda: _remove_old_states(folder))


def load_newest_state(
    folder: Path,
    run_key: str,
    tensors: Mapping[str, Tensor],
    group: Group = Group(),  # noqa: B008  it never changes
) -> tuple[int, dict[str, Any]] | None:
    """Fill tensors from the newest valid state, however many processes wrote it; log those that are damaged.

    All processes call this. The main process reads and sends the tensors to the others, which may not see the
    folder; in mode fsdp each process reads its part.

    Returns:
        The number of updates and the progress that `save_state` wrote; None if there is no state, and then
        the tensors are unchanged.
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
    """Return step and progress of the newest valid state; fill tensors that are not sharded from it."""
    for unfinished in folder.glob(".step-*"):  # a killed process left it
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
    """Return step and progress of a state, after checking that its files are unchanged and of this run."""
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
    """Read a file into tensors. All are checked before the first is changed."""
    found = read_tensors(path)
    check_tensors(found, tensors, path)
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def remove_states(folder: Path) -> None:
    """Remove a run's states, once its model is saved."""
    shutil.rmtree(folder, ignore_errors=True)


def prune_runs(folder: Path, key: str) -> None:
    """Remove the states of other runs, except for the KEPT_RUNS that were written last.

    Args:
        folder: has a folder of states for each run, named by its key.
        key: of the current run, which is kept.
    """
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != key]
    for old in sorted(others, key=lambda run: (run.stat().st_mtime_ns, run.name))[: -KEPT_RUNS or None]:
        log.info("the states of run %s are removed: it was not resumed for long", old.name)
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    """Return the states of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def _remove_old_states(folder: Path) -> None:
    for old in _states(folder)[:-KEPT_STATES]:
        shutil.rmtree(old)
