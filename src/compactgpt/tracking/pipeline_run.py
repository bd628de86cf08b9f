"""Read the run folder of a `dvc` process and find the outcome of each stage.

A stage that runs writes a journal there. A stage that DVC skips does not: only dvc.lock has its outcome.
"""

import csv
import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compactgpt.common.errors import UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import MANIFEST, read_json
from compactgpt.tracking import dvc_files, journal
from compactgpt.tracking.dvc_files import LOCK, MODEL, PARAMS, TOKENS, Cache, Commit, Entry, Folder, Place
from compactgpt.tracking.journal import BEFORE, JOURNAL, JournalFile, is_alive, tracking_folder

PIPELINE = "pipeline"  # the MLflow run of a whole pipeline has this value as its tag `stage`
AFTER = "after"  # name of the folder with copies of dvc.lock, reports and more, made when `dvc` has ended
OUTCOME = "outcome.json"
COMMIT_SECONDS = 30.0  # time after an experiment's last stage in which DVC may still make the git commit
SKIPPED, NOT_REACHED = "skipped", "not reached"


class Outcome(BaseModel):
    """The outcome of a `dvc` process, which `RunFolder` saves as `after/outcome.json`."""

    status: str = "FINISHED"  # the status of the pipeline's run in MLflow
    reason: str = ""  # a sentence that says why stages have no results; empty if all have results
    stages: dict[str, str] = {}  # name of a stage -> a text such as `ran (finished)` or `not reached`
    entries: dict[str, str] = {}  # name of a stage that succeeded -> SHA-256 of its entry in dvc.lock


class RunFolder:
    """The folder with the journals of one `dvc` process, or of one stage started by hand."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path.parents[2]
        self.before, self.after = Folder(path / BEFORE), Folder(path / AFTER)

    def journals(self) -> list[JournalFile]:
        """Return the journals in the folder, the oldest first. Skips a journal without a whole first line."""
        found = sorted(path.parent for path in self.path.glob(f"*/{JOURNAL}"))
        return [file for folder in found if (file := JournalFile(folder)).start]

    def stages(self) -> list[JournalFile]:
        """Return the journals of all stages in this folder, without the pipeline's own; the oldest first."""
        return [file for file in self.journals() if file.start["stage"] != PIPELINE]

    @cached_property
    def start(self) -> dict[str, Any]:
        """The first line of the oldest journal. The key `pipeline` is missing for a stage started by hand."""
        return self.journals()[0].start

    @property
    def command(self) -> str:
        """The command of the `dvc` process, in a form that users can type."""
        command, name = str(self.start["pipeline"]["command"]), self.start["tags"].get("dvc.experiment")
        # DVC's queue runs `dvc exp exec-run`, a command that a user can't run.
        return f"dvc exp run -n {name}" if name and "exec-run" in command else command

    @property
    def alive(self) -> bool:
        """Whether the `dvc` process or one of its stages still runs."""
        if "pipeline" in self.start and is_alive(self.start["pipeline"]):
            return True
        return not all(file.status for file in self.journals())

    @contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[bool]:
        """Lock the run folder for a `with` block.

        Yields True with the lock, False if another process has it. With `wait`, waits for the lock instead.
        """
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def outcome(self) -> Outcome | None:
        """Return the outcome of the `dvc` process, or None if `keep_after` has not saved the outcome yet."""
        saved = self.after.read(OUTCOME)
        return Outcome.model_validate_json(saved) if saved else None

    def keep_after(self) -> bool:
        """Save dvc.lock, reports and the outcome of an ended `dvc` process to the folder `after/`.

        Returns False while `dvc` runs or may still commit its experiment, otherwise True.
        """
        if "pipeline" not in self.start or self.outcome():
            return True
        if self.alive or (place := self._place()) is None:
            return False
        self._write_after(place)
        return True

    def _place(self) -> Place | None:
        """Return the folder or commit with the final dvc.lock, or None if DVC may still make the commit."""
        tags, workspace = self.start["tags"], self.start["workspace"]
        if name := tags.get("dvc.experiment"):
            baseline = tags.get("dvc.baseline", "")
            reference = f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
            with suppress(UserError):  # git raises UserError if the experiment has no commit
                return Commit(self.root, git_text(self.root, "rev-parse", "--verify", "--quiet", reference))
            # DVC may still create the commit. Give up COMMIT_SECONDS after the last change of a journal.
            newest = max(file.path.stat().st_mtime for file in self.journals())
            return Folder(self.path / "no-commit") if time.time() - newest > COMMIT_SECONDS else None
        # A later `dvc` process may have changed dvc.lock in this work tree. The first stage of that process
        # saved the old dvc.lock in `before/`, so use this copy.
        for later in run_folders(self.root):
            if later.path.name > self.path.name and later.start.get("workspace") == workspace:
                return later.before
        return Folder(Path(workspace))

    def _write_after(self, place: Place) -> None:
        """Save dvc.lock, params.yaml, package versions, reports, losses and the outcome to `after/`."""
        cache, making = Cache(self.root), self.path / "after.tmp"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        if self.before.root.exists():  # `before/` is missing if the first stage was killed at once
            kept = shutil.ignore_patterns(LOCK)
            shutil.copytree(self.before.root, making, ignore=kept, dirs_exist_ok=True)
        if lock := place.read(LOCK):
            (making / LOCK).write_bytes(lock)
        (making / "environment").mkdir()
        (making / "environment/packages.txt").write_text(journal.packages())
        # A folder `place` can lack the code and the corpus, so `find_outcome` also gets the work tree.
        tree = Path(self.start["workspace"]) if isinstance(place, Folder) else None
        found = find_outcome(place, self.before, self.stages(), self.command, tree)
        for path, md5 in outs(place, found).items():
            if path.startswith(("reports/", "data/evaluation", "data/baseline")):
                dvc_files.checkout(cache, place, path, md5, making / path)
        (making / OUTCOME).write_text(found.model_dump_json())
        making.rename(self.after.root)


def run_folders(root: Path) -> list[RunFolder]:
    """Return the run folders that have a journal, the oldest first."""
    found = [RunFolder(path) for path in sorted(tracking_folder(root).glob("*/"))]
    return [folder for folder in found if folder.journals()]


def find_outcome(
    place: Place, before: Place, journals: list[JournalFile], command: str, tree: Path | None
) -> Outcome:
    """Return the outcome of the `dvc` process that ran `command`.

    `before` has dvc.lock and params.yaml from the start of the process. `place` has these files
    from the end of the process. `tree` is the work tree, or None if `place` is a commit.
    """
    try:
        stages, locked = dvc_files.read_stages(place), dvc_files.read_entries(place)
        old = dvc_files.entries_of(before.read(LOCK))
        params = dvc_files.parse_yaml(before.read(PARAMS) or place.read(PARAMS), PARAMS)
    except UserError as error:
        return Outcome(status="FAILED", reason=str(error))
    ran = {file.start["stage"]: file for file in journals}
    found, made = Outcome(), dvc_files.all_outs(locked)
    valid: dict[str, str] = {}  # path -> MD5 for outputs of stages that succeeded or are up to date
    for stage in stages:  # in dvc.yaml, each stage follows all stages on which it depends
        entry = locked.get(stage, {})
        found.stages[stage] = NOT_REACHED
        if stage in ran:
            found.stages[stage] = f"ran ({ran[stage].status.lower()})"
            is_valid = ran[stage].status == "FINISHED"
        elif is_valid := _is_current(entry, params, made, valid, tree):
            origin = "unchanged" if old.get(stage) == entry else "from the run cache of DVC"
            found.stages[stage] = f"{SKIPPED}: {origin}"
        if entry and is_valid:
            found.entries[stage] = dvc_files.entry_key(entry)
            valid |= dvc_files.outs(entry)
    named = [stage for stage in stages if {stage, stage.partition("@")[0]} & set(command.split())]
    if missing := [stage for stage in named or stages if stage not in found.entries]:
        found.reason = f"`dvc` failed or was stopped: {LOCK} has no results for {', '.join(missing)}"
    ends = [*(file.status for file in journals), "FAILED" if found.reason else "FINISHED"]
    found.status = next(status for status in ("KILLED", "FAILED", "FINISHED") if status in ends)
    return found


def _is_current(
    entry: Entry, params: dict[str, Any], made: dict[str, str], valid: dict[str, str], tree: Path | None
) -> bool:
    """Return whether a stage is up to date: whether its inputs and `params` are the same as in `entry`.

    `entry` is the stage's entry in dvc.lock. `made` maps the path of each output in dvc.lock to its MD5.
    `valid` has the part of `made` that is from stages that succeeded or are up to date.
    `tree` is the work tree, or None if the files are read from a commit.
    """
    wanted = dvc_files.entry_params(entry)
    if not entry or wanted != {key: dvc_files.value_at(params, key) for key in wanted}:
        return False
    for path, md5 in dvc_files.deps(entry).items():
        inside = {out for out in made if dvc_files.overlap(out, path)}
        if not inside <= valid.keys() or made.get(path, md5) != md5:
            return False
        # No stage made this input: it is code, the corpus, or a file such as claims.yaml. In the work tree,
        # it may have changed since the stage ran, so compare its MD5. A commit has what the stage read.
        if not inside and tree and dvc_files.md5_path(tree / path) != md5:
            return False
    return True


def outs(place: Place, found: Outcome) -> dict[str, str]:
    """Return path -> MD5 for the outputs of the stages in `found.entries`. Reads dvc.lock in `place`."""
    entries = dvc_files.read_entries(place) if found.entries else {}
    return dvc_files.all_outs({stage: entries[stage] for stage in found.entries})


def skipped_metrics(after: Path, found: Outcome) -> Iterator[dict[str, Any]]:
    """Yield journal lines with the metrics of the stages that DVC skipped. Reads the reports in `after`."""
    for stage in found.entries:
        path = after / f"reports/{stage.replace('@', '/')}.json"
        if not found.stages[stage].startswith(SKIPPED) or not path.exists():
            continue
        yield {"kind": "metrics", "step": 0, "values": journal.stage_metrics(stage, read_json(path))}
        curve = after / "reports/loss.csv"
        if stage == "training" and curve.exists():
            for row in csv.DictReader(curve.read_text(encoding="utf-8").splitlines()):
                losses = {"train/loss": row.get("train_loss"), "val/loss": row.get("val_loss")}
                values = {key: float(value) for key, value in losses.items() if value}
                yield {"kind": "metrics", "step": int(row["step"]), "values": values}


def hashes(
    after: Folder, cache: Cache, made: Mapping[str, str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the tags lock_sha256 and weights_sha256 for an MLflow run, and its token files as data sets.

    The data sets have the form that `token_files` returns. `made` maps the path of an output to its MD5.
    """
    tags, datasets = {"lock_sha256": hashlib.sha256(after.read(LOCK) or b"").hexdigest()}, []
    for md5 in (made[path] for path in (TOKENS, MODEL) if path in made):
        if cache.has(md5) and (manifest := cache.files(md5).get(MANIFEST)):
            files = read_json(manifest)["files"]
            if weights := files.get("model.safetensors"):
                tags["weights_sha256"] = weights["sha256"]
            datasets += journal.token_files(files, {"train": "training", "val": "validation"})
    return tags, datasets


def describe(command: str, found: Outcome, links: Mapping[str, str]) -> str:
    """Return a Markdown text for a pipeline's run in MLflow: command, outcome and a table of stages.

    `links` maps the name of a stage to a link to the MLflow run that made its outputs.
    """
    lines = [f"`{command}`", "", *([f"**{found.reason}**", ""] if found.reason else [])]
    lines += ["| stage | in this run | made by |", "| --- | --- | --- |"]
    for stage, text in found.stages.items():
        made_by = "" if text == NOT_REACHED else links.get(stage, "unknown: MLflow lacks this run")
        lines.append(f"| {stage} | {text} | {made_by} |")
    return "\n".join(lines)
