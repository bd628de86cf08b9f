"""Save and load training states. A state is a folder such as `step-00000200` in its training run's folder.

`state.safetensors` has the tensors of the model and the optimizers, and `progress.json` has the losses.
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

KEPT_STATES = 2  # states kept per training run: if the newest one is damaged, the other one is used
KEPT_RUNS = 2  # training runs that can still resume, besides the current one
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
    """Write the training state after `step` updates, and delete all but the newest KEPT_STATES states.

    `folder` is the folder of the training run, and `run_key` is the hash from `trainer.run_key`. All
    processes must call this function; only the main process writes files.
    """
    full = group.gather(tensors)

    def write() -> None:
        facts = {"run_key": run_key, "step": step}
        state = atomic_folder(folder / f"step-{step:08d}", facts, kind="training state", force=True)
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
    """Copy the newest valid state of the training run `run_key` into `tensors`.

    Returns the state's step and the content of its progress.json, or None if no state is valid. All
    processes must call this function; only the main process reads files.
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
    """Return the step of a training state.

    Raises BadData if a file of the state was changed, or if the state is not from the run `run_key`.
    """
    manifest = verified_manifest(state)
    step = int(state.name.removeprefix("step-"))
    if (manifest.get("run_key"), manifest.get("step")) != (run_key, step):
        raise BadData(f"{state / 'manifest.json'} belongs to another training run or another step")
    return step


def prune_runs(folder: Path, run_key: str) -> None:
    """Delete old training runs in `folder`. Keep the run `run_key` and the KEPT_RUNS newest other runs."""
    others = [run for run in folder.glob("*") if any(run.glob("step-*")) and run.name != run_key]
    for old in sorted(others, key=lambda run: run.stat().st_mtime_ns)[:-KEPT_RUNS]:
        shutil.rmtree(old)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))  # the oldest state is the first
