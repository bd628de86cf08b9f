"""Save and load training states: atomic writes of safetensors and JSON, verified when read.

A state is a folder such as `step-00000200`: `state.safetensors` has the full tensors of the model and the
optimizers, `progress.json` has the rest. All states of a run are in one folder, whose name is the run key.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Write the state of a run after `step` updates, and keep only the newest KEPT_STATES states of the run.

    All processes call this function, because sharded tensors are gathered; the main process writes.
    """
    full = group.gather(tensors)

    def write() -> None:
        facts = {"run_key": run_key, "step": step}
        state = atomic_folder(folder / f"step-{step:08d}", facts, kind=STATE_KIND, private=True)
        with state as temporary:
            write_tensors(temporary / TENSORS, full)
            write_json(temporary / PROGRESS, progress)
        for old in _states(folder)[:-KEPT_STATES]:
            shutil.rmtree(old)

    group.run_on_main(write)


def load_newest_state(
    folder: Path,
    run_key: str,
    tensors: Mapping[str, Tensor],
    group: Group = Group(),  # noqa: B008  it never changes
) -> tuple[int, dict[str, Any]] | None:
    """Read the newest valid state into `tensors`, and return its step and progress; None without a state.

    Each invalid state is skipped with a warning. All processes call this function. Only the main process
    reads the file, because other nodes may not see the folder.
    """
    full: dict[str, Tensor] = {}

    def read() -> tuple[int, dict[str, Any]] | None:
        for unfinished in folder.glob(".step-*"):  # an incomplete state of a process that was killed
            shutil.rmtree(unfinished)
        for state in reversed(_states(folder)):
            try:
                step = _check_manifest(state, run_key)
                full.update(read_tensors(state / TENSORS))
                check_tensors(full, tensors, state / TENSORS)
                return step, read_json(state / PROGRESS)
            except (BadData, MissingInput) as error:
                log.warning("training state %s is skipped: %s", state.name, error)
                full.clear()
        return None

    found = group.run_on_main(read)
    if found is not None:
        group.scatter(full, tensors)
    return found


def _check_manifest(state: Path, run_key: str) -> int:
    """Check that a state's files are unchanged and belong to this run; return its step."""
    manifest = verified_manifest(state)
    step = int(state.name.removeprefix("step-"))
    expected = {"kind": STATE_KIND, "run_key": run_key, "step": step}
    if {key: manifest.get(key) for key in expected} != expected:
        raise BadData(f"{state / 'manifest.json'} names another run or another step")
    return step


def remove_states(folder: Path) -> None:
    """Remove all training states of a run; call this after the model is saved."""
    shutil.rmtree(folder, ignore_errors=True)


def prune_runs(folder: Path, key: str) -> None:
    """Remove the states of other runs than `key`, except those of the KEPT_RUNS most recent runs."""
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != key]
    for old in sorted(others, key=lambda run: (run.stat().st_mtime_ns, run.name))[: -KEPT_RUNS or None]:
        log.info("removing the training states of run %s: newer unfinished runs exist", old.name)
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    """Return the states of a run, oldest first."""
    return sorted(folder.glob("step-*"))
