"""Read a run folder: its journals, how much of each journal is copied, and the files that `dvc` left.

`tracking.journal` describes the layout. This module sends no request to a server.
"""

import fcntl
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from compactgpt.common.console import report
from compactgpt.common.errors import BadData, UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json, write_json
from compactgpt.tracking import pipeline_run
from compactgpt.tracking.dvc_files import LOCK, PARAMS, Cache, Commit, Folder, Place, parse_yaml
from compactgpt.tracking.journal import BEFORE, JournalFile, flatten, is_alive, tracking_folder
from compactgpt.tracking.pipeline_run import OUTCOME, Outcome

PIPELINE = "pipeline"  # the stage name of a journal that belongs to no stage
OUTCOME_SECONDS = 30.0  # how long to wait for the files that `dvc` writes at its end


class RunFolder:
    """The journals of one `dvc` process, or of one stage that was run by hand: see `tracking.journal`."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parents[2]
        self.before = Folder(path / BEFORE)  # the files that the first stage found

    def journals(self) -> list[JournalFile]:
        """Return the journals that have a first line, oldest first."""
        found = sorted(path.parent for path in self.path.glob("*/journal.jsonl"))
        return [journal for folder in found if (journal := JournalFile(folder)).start]

    def stages(self) -> list[JournalFile]:
        """Return the journals of stages."""
        return [journal for journal in self.journals() if journal.start["stage"] != PIPELINE]

    @cached_property
    def start(self) -> dict[str, Any]:
        """The first line of the first journal."""
        return self.journals()[0].start

    @property
    def is_pipeline(self) -> bool:
        """Whether the stages belong to a `dvc` process."""
        return "pipeline" in self.start

    @property
    def alive(self) -> bool:
        """Whether the `dvc` process or a stage still runs, and may add lines."""
        if self.is_pipeline and is_alive(self.start["pipeline"]):
            return True
        return not all(journal.status for journal in self.journals())

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[bool]:
        """Lock the folder, so that only one process copies it. Yield whether this process has the lock.

        With `wait`, wait until another process releases the lock, at most a minute after the runs' end.
        """
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @property
    def command(self) -> str:
        """The command with which a user can start the same run."""
        command, name = str(self.start["pipeline"]["command"]), self.start["tags"].get("dvc.experiment")
        if not name or "exec-run" not in command:  # `dvc exp exec-run` is a worker of DVC's queue
            return command
        baseline = Commit(self.root, self.start["tags"].get("dvc.baseline", "HEAD")).read(PARAMS)
        old, new = (flatten(parse_yaml(content, PARAMS)) for content in (baseline, self.before.read(PARAMS)))
        changed = [f"-S {key}={value}" for key, value in new.items() if old.get(key) != value]
        return " ".join(["dvc exp run -n", name, *changed])

    def outcome(self) -> Outcome | None:
        """Return the outcome of the `dvc` process; None if it is not saved yet.

        Raises:
            BadData: the file is damaged.
        """
        path = self.path / "after" / OUTCOME
        try:
            return Outcome.model_validate(read_json(path), strict=True) if path.exists() else None
        except (BadData, ValueError) as error:
            folder = shlex.quote(str(path.parent))
            raise BadData(
                f"{path} is damaged: `rm -r {folder}`, then `compactgpt sync` saves the files as they are now"
            ) from error

    def keep_after(self) -> bool:
        """Save the files of the `dvc` process if it has ended. Return whether all files are saved."""
        if not self.is_pipeline or self.outcome():
            return True
        if self.alive:
            return False
        if (place := self._place()) is None:
            return False
        # `place` may be the next run's `before/`, which has no code: the work tree has it.
        tree = Path(self.start["workspace"])
        pipeline_run.write_after(place, Cache(self.root), self.path, self.stages(), self.command, tree)
        return True

    def _place(self) -> Place | None:
        """Return the place from which to read dvc.lock; None if `dvc` may still write it.

        For a DVC experiment, this is the experiment's commit: DVC removes the temporary folder, or uses it
        for the next experiment. For `dvc repro`, it is the work tree, or the next run's `before/` folder.
        """
        tags, workspace = self.start["tags"], self.start["workspace"]
        newest = max(journal.path.stat().st_mtime for journal in self.journals())
        late = time.time() - newest > OUTCOME_SECONDS
        if name := tags.get("dvc.experiment"):
            baseline = tags.get("dvc.baseline", "")
            reference = f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
            with suppress(UserError):  # there is no such reference
                return Commit(self.root, git_text(self.root, "rev-parse", "--verify", "--quiet", reference))
            failed = any(journal.status != "FINISHED" for journal in self.stages())
            return Folder(self.path / "no-commit") if failed or late else None
        for later in run_folders(self.root):
            if later.path.name > self.path.name and later.start.get("workspace") == workspace:
                return later.before
        return Folder(Path(workspace)) if late or Folder(Path(workspace)).read(LOCK) else None


class Copied(BaseModel):
    """How much of a run folder, or of one journal, has been copied to a store. Saved there as mlflow.json."""

    store: str  # the store's identity
    run_id: str = ""
    offset: NonNegativeInt = 0  # bytes of the journal that have been copied
    complete: bool = False

    @classmethod
    def load(cls, folder: Path, store: str = "") -> "Copied":
        """Read mlflow.json. Return an empty state if the file is missing, damaged, or names another store."""
        path, found = folder / "mlflow.json", None
        try:
            found = cls.model_validate(read_json(path), strict=True) if path.exists() else None
        except (BadData, ValueError):
            report(f"warning: {path} is damaged: the run is copied again")
        return found if found and store in ("", found.store) else cls(store=store)

    def save(self, folder: Path) -> None:
        """Write mlflow.json."""
        write_json(folder / "mlflow.json", self.model_dump())


def run_folders(root: Path) -> list[RunFolder]:
    """Return the run folders of a repository, oldest first.

    Folders without a journal are left out, and folders of version 0.1, whose journals do not name a store.
    """
    found = [RunFolder(path) for path in sorted(tracking_folder(root).glob("*/")) if path.is_dir()]
    return [folder for folder in found if folder.journals() and "store" in folder.start]
