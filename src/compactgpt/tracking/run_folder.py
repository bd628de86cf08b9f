"""A run folder on disk: its journals, what a store has taken of them, and the files that `dvc` left.

`tracking.journal` describes the layout. Nothing here asks a server.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, NonNegativeInt

from compactgpt.common.console import report
from compactgpt.common.errors import BadData, UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json, write_json
from compactgpt.tracking import pipeline_run
from compactgpt.tracking.dvc_files import LOCK, PARAMS, Cache, Commit, Folder, Place, parse_yaml
from compactgpt.tracking.journal import BEFORE, JournalFile, flatten, is_alive, tracking_folder
from compactgpt.tracking.pipeline_run import Outcome

PIPELINE = "pipeline"  # the stage of a journal that stands for no stage
OUTCOME_SECONDS = 30.0  # for the files that `dvc` leaves
Note = TypeVar("Note", bound=BaseModel)


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
        """What the first journal begins with."""
        return self.journals()[0].start

    @property
    def is_pipeline(self) -> bool:
        """Whether the stages belong to a `dvc` process."""
        return "pipeline" in self.start

    @property
    def alive(self) -> bool:
        """Whether something may still be added."""
        if self.is_pipeline and is_alive(self.start["pipeline"]):
            return True
        return not all(journal.status for journal in self.journals())

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[bool]:
        """Try to be the only process that copies the folder; yields whether that worked.

        With `wait`, another process is waited for: it ends a minute after the runs at the latest.
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
        """The command that a user can give to get such a run."""
        command, name = str(self.start["pipeline"]["command"]), self.start["tags"].get("dvc.experiment")
        if not name or "exec-run" not in command:  # `dvc exp exec-run` is a worker of DVC's queue
            return command
        baseline = Commit(self.root, self.start["tags"].get("dvc.baseline", "HEAD")).read(PARAMS)
        old, new = (flatten(parse_yaml(content, PARAMS)) for content in (baseline, self.before.read(PARAMS)))
        changed = [f"-S {key}={value}" for key, value in new.items() if old.get(key) != value]
        return " ".join(["dvc exp run -n", name, *changed])

    def outcome(self) -> Outcome | None:
        """Return what the `dvc` process did; None where its files are not kept yet, or are damaged."""
        if not (self.path / "after").exists():
            return None
        return _read_note(self.path / "outcome.json", Outcome, "it is written again")

    def keep_after(self) -> bool:
        """Keep what the `dvc` process left once it has ended; whether that is done."""
        if not self.is_pipeline or self.outcome():
            return True
        if self.alive or (place := self._place()) is None:
            return False
        pipeline_run.write_after(place, Cache(self.root), self.path, self.stages(), self.command)
        return True

    def _place(self) -> Place | None:
        """Return where dvc.lock is read; None where it may still come.

        Of an experiment that is the commit that DVC keeps: its scratch folder is being removed, and its
        workspace may be the next one's. Of `dvc repro` it is the work tree, or what a later run found there.
        """
        tags, workspace = self.start["tags"], self.start["workspace"]
        newest = max(journal.path.stat().st_mtime for journal in self.journals())
        late = time.time() - newest > OUTCOME_SECONDS
        if name := tags.get("dvc.experiment"):
            if commit := experiment_commit(self.root, name, tags.get("dvc.baseline", "")):
                return Commit(self.root, commit)
            failed = any(journal.status != "FINISHED" for journal in self.stages())
            return Folder(self.path / "no-commit") if failed or late else None
        for later in run_folders(self.root):
            if later.path.name > self.path.name and later.start.get("workspace") == workspace:
                return later.before
        return Folder(Path(workspace)) if late or Folder(Path(workspace)).read(LOCK) else None


class Copied(BaseModel):
    """What a store has taken of a run folder, or of one journal: the file mlflow.json in it."""

    store: str  # identity
    run_id: str = ""
    offset: NonNegativeInt = 0  # bytes of the journal
    complete: bool = False

    @classmethod
    def load(cls, folder: Path, store: str = "") -> "Copied":
        """Read the file; it counts only for the store that it names (by default any)."""
        found = _read_note(folder / "mlflow.json", cls, "the run is copied again")
        return found if found and store in ("", found.store) else cls(store=store)

    def save(self, folder: Path) -> None:
        """Write the file."""
        write_json(folder / "mlflow.json", self.model_dump())


def _read_note(path: Path, kind: type[Note], consequence: str) -> Note | None:
    """Read a file of ours; one that is damaged, or of another program, is reported and does not count."""
    if not path.exists():
        return None
    try:
        return kind.model_validate(read_json(path), strict=True)
    except (BadData, ValueError):
        report(f"warning: {path} is damaged: {consequence}")
        return None


def experiment_commit(root: Path, name: str, baseline: str) -> str:
    """Return the commit that DVC keeps of an experiment on a commit; nothing without one."""
    reference = f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
    with suppress(UserError):
        return git_text(root, "rev-parse", "--verify", "--quiet", reference)
    return ""


def run_folders(root: Path) -> list[RunFolder]:
    """Return the run folders of a repository, oldest first; those without a journal are left out.

    So are those of version 0.1, whose journals do not name their store.
    """
    found = [RunFolder(path) for path in sorted(tracking_folder(root).glob("*/")) if path.is_dir()]
    return [folder for folder in found if folder.journals() and "store" in folder.start]
