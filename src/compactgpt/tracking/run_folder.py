"""A run folder on disk: its journals, what a store has taken of them, and the files that `dvc` left.

`tracking.journal` describes the layout. Nothing here asks a server.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import read_json, write_json
from compactgpt.tracking import pipeline_run
from compactgpt.tracking.dvc_files import LOCK, PARAMS, Cache, Commit, Folder, Place, parse_yaml
from compactgpt.tracking.journal import BEFORE, flatten, journal_lines, tracking_folder
from compactgpt.tracking.pipeline_run import StageRun

PIPELINE = "pipeline"  # the stage of a journal that stands for no stage
OUTCOME_SECONDS = 30.0  # for the files that `dvc` leaves
_TAIL = 65_536  # bytes that hold the last line of a journal


def is_alive(pid: int, created: float) -> bool:
    """Whether a process of this machine still runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1)
    except psutil.NoSuchProcess:
        return False


class RunFolder:
    """The journals of one `dvc` process, or of one stage that was run by hand: see `tracking.journal`."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parents[2]

    def journals(self) -> list[Path]:
        """Return the folders of journals that have a first line, oldest first."""
        found = sorted(path.parent for path in self.path.glob("*/journal.jsonl"))
        return [folder for folder in found if first_line(folder)]

    def stages(self) -> list[Path]:
        """Return the folders of journals of stages."""
        return [folder for folder in self.journals() if first_line(folder)["stage"] != PIPELINE]

    @cached_property
    def start(self) -> dict[str, Any]:
        """What the first journal begins with."""
        return first_line(self.journals()[0])

    @property
    def is_pipeline(self) -> bool:
        """Whether the stages belong to a `dvc` process."""
        return "pipeline" in self.start

    @property
    def alive(self) -> bool:
        """Whether something may still be added."""
        if self.is_pipeline and is_alive(self.start["pipeline"]["pid"], self.start["pipeline"]["created"]):
            return True
        lines = [first_line(folder) for folder in self.journals() if last_line(folder)["kind"] != "end"]
        return any(is_alive(line["pid"], line["created"]) for line in lines)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Try to be the only process that copies the folder; yields whether that worked."""
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def stage_runs(self) -> list[StageRun]:
        """Return the stages that ran, and how they ended."""
        found = []
        for folder in self.stages():
            last = last_line(folder)
            status = last["status"] if last["kind"] == "end" else "KILLED"
            found.append(StageRun(first_line(folder)["stage"], status, folder))
        return found

    @property
    def command(self) -> str:
        """The command that a user can give to get such a run."""
        command, name = str(self.start["pipeline"]["command"]), self.start["tags"].get("dvc.experiment")
        if not name or "exec-run" not in command:
            return command
        baseline = Commit(self.root, self.start["tags"].get("dvc.baseline", "HEAD")).read(PARAMS)
        before, after = (flatten(parse_yaml(one, PARAMS)) for one in (baseline, self.before.read(PARAMS)))
        changed = [f"-S {key}={value}" for key, value in after.items() if before.get(key) != value]
        return " ".join(["dvc exp run -n", name, *changed])

    @property
    def before(self) -> Folder:
        """The files that the first stage found."""
        return Folder(self.path / BEFORE)

    def keep_after(self) -> bool:
        """Keep what the `dvc` process left once it has ended; whether that is done."""
        if not self.is_pipeline or (self.path / "after").exists():
            return True
        if self.alive or (place := self._place()) is None:
            return False
        pipeline_run.write_after(place, Cache(self.root), self.path, self.stage_runs())
        return True

    def _place(self) -> Place | None:
        """Return where dvc.lock is read; None where it may still come.

        Of an experiment that is the commit that DVC keeps: its scratch folder is being removed, and its
        workspace may be the next one's. Of `dvc repro` it is the work tree, or what a later run found there.
        """
        tags, workspace = self.start["tags"], Path(self.start["workspace"])
        newest = max((folder / "journal.jsonl").stat().st_mtime for folder in self.journals())
        late = time.time() - newest > OUTCOME_SECONDS
        if name := tags.get("dvc.experiment"):
            if commit := experiment_commit(self.root, name, tags.get("dvc.baseline", "")):
                return Commit(self.root, commit)
            failed = any(run.status != "FINISHED" for run in self.stage_runs())
            return Folder(self.path / "no-commit") if failed or late else None
        for later in run_folders(self.root):
            if later.path.name > self.path.name and later.start.get("workspace") == str(workspace):
                return later.before
        return Folder(workspace) if late or Folder(workspace).read(LOCK) else None


def experiment_commit(root: Path, name: str, baseline: str) -> str:
    """Return the commit that DVC keeps of an experiment on a commit; nothing without one."""
    with suppress(UserError):
        return git_text(
            root, "rev-parse", "--verify", "--quiet", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
        )
    return ""


def run_folders(root: Path) -> list[RunFolder]:
    """Return the run folders of a repository, oldest first; those without a journal are left out.

    So are those of version 0.1, whose journals do not name their store.
    """
    found = [RunFolder(path) for path in sorted(tracking_folder(root).glob("*/")) if path.is_dir()]
    return [folder for folder in found if folder.journals() and "store" in folder.start]


def first_line(folder: Path) -> dict[str, Any]:
    """Return what a journal begins with; empty where the stage has not begun, or after a power loss."""
    with open(folder / "journal.jsonl", "rb") as file:
        lines = journal_lines(file.readline())
    return lines[0] if lines else {}


def last_line(folder: Path) -> dict[str, Any]:
    """Return the last whole line of a journal that has a first one."""
    with open(folder / "journal.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = journal_lines(file.read())
    return lines[-1] if lines else first_line(folder)


@dataclass
class Copied:
    """What a store has taken of a run folder, or of one journal."""

    path: Path  # of the note of it
    store: str  # identity
    run_id: str = ""
    offset: int = 0  # bytes of the journal
    resumed: bool = False  # the run is that of an earlier journal
    model_tries: int = 0
    complete: bool = False

    @classmethod
    def load(cls, folder: Path, store: str = "") -> "Copied":
        """Read the note; it counts only for the store that it names (by default any)."""
        path = folder / "mlflow.json"
        facts = read_json(path) if path.exists() else {}
        return cls(path, **(facts if facts and store in ("", facts["store"]) else {"store": store}))

    def save(self) -> None:
        """Write the note."""
        write_json(self.path, {key: value for key, value in vars(self).items() if key != "path"})
