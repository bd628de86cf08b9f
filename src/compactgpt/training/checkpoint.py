"""Save and load training states; a state is a folder such as `step-00000200`.

`state.safetensors` has the tensors of the model and the optimizers, and `progress.json` has the losses.
A state is written whole or not at all. All states of a run are in one folder, whose name is the run key:
a hash of everything that the result of the run depends on.
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

STATE_KIND = "training state"  # value of `kind` in the manifest.json of a state
# Number of states that a run keeps, in case the newest one is damaged.
KEPT_STATES = 2
# Number of other unfinished runs whose states are kept: such a run can resume.
KEPT_RUNS = 2
TENSORS, PROGRESS = "state.safetensors", "progress.json"
log = logging.getLogger(__name__)


def save_state(
    folder: Path,
    run_key: str,
    step: int,
    tensors: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    group: Group = Group(),  # noqa: B008  a Group never changes
) -> None:
    """Write the state of a run after `step` updates, and keep its newest KEPT_STATES states.

    All processes must call this function; only the main process writes files.
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
    group: Group = Group(),  # noqa: B008  a Group never changes
) -> tuple[int, dict[str, Any]] | None:
    """Copy the newest valid training state into `tensors`, and return its step and progress.

    Returns None if no state is valid, and warns of each invalid state. All processes must call this function;
    only the main process reads the files.
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
    """Verify that a state is unchanged and of this run, and return its step."""
    manifest = verified_manifest(state)
    step = int(state.name.removeprefix("step-"))
    expected = {"kind": STATE_KIND, "run_key": run_key, "step": step}
    if {key: manifest.get(key) for key in expected} != expected:
        raise BadData(f"{state / 'manifest.json'} belongs to another run or another step")
    return step


def prune_runs(folder: Path, key: str) -> None:
    """Remove the states of old runs: all but `key` and the KEPT_RUNS newest others.

    `folder` has a folder for each run, whose name is the run key.
    """
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != key]
    for old in sorted(others, key=lambda run: run.stat().st_mtime_ns)[:-KEPT_RUNS]:
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))  # the oldest state is the first
