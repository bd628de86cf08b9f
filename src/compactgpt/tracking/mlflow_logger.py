"""Copy journals to MLflow in a child process.

`start_logger` starts one child process for each run folder. It copies new lines of the journals, logs system
metrics, and closes the runs of killed stages (KILLED). When the `dvc` process has ended, it completes the
pipeline's run. If the server does not answer, `compactgpt sync` copies the lines later. A second copy changes
nothing, because metrics have the journal's time and step.
"""

import functools
import hashlib
import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from compactgpt.common.console import report
from compactgpt.common.errors import Busy, MissingInput, UserError
from compactgpt.common.git import git_facts
from compactgpt.tracking import journal, pipeline_run
from compactgpt.tracking.dvc_files import CHAIN, LOCK, PARAMS, Cache, Folder, parse_yaml
from compactgpt.tracking.journal import BEFORE, JournalFile, tracking_store
from compactgpt.tracking.run_folder import PIPELINE, Copied, RunFolder, run_folders
from compactgpt.tracking.store import Store, open_store, saved_identity, store_errors
from compactgpt.tracking.system_metrics import SystemMetrics

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # how long to retry a store that fails after the runs have ended
MAX_LOG = 1_000_000  # bytes; a larger log file is overwritten
MAX_REPORTED = 50  # different errors that one process logs


def start_logger(run_folder: Path) -> None:
    """Start a child process that copies a run folder, unless another process already copies it."""
    with RunFolder(run_folder).locked() as is_free:
        pass
    if not is_free:
        return
    path = run_folder / "log"
    with open(path, "ab" if path.exists() and path.stat().st_size < MAX_LOG else "wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "compactgpt.tracking.mlflow_logger", str(run_folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            cwd=run_folder.parents[2],  # not an experiment's scratch folder, which DVC removes
        )  # fmt: skip


class Logger:
    """Copies one run folder to its tracking store."""

    def __init__(self, folder: RunFolder, store: Store) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.copied = Copied.load(folder.path, store.identity)  # its run_id is the pipeline's
        self._monitor = functools.cache(SystemMetrics)  # one monitor per stage process

    def copy(self) -> bool:
        """Copy new lines. Return whether all runs have ended and are completely copied."""
        if self.copied.complete:
            return True
        if self.folder.is_pipeline and not self.copied.run_id:
            self.copied.run_id = self._start_pipeline()
            self.copied.save(self.folder.path)
        done = [self._copy_journal(file) for file in self.folder.stages()]
        if not all(done) or self.folder.alive or not self.folder.keep_after():
            return False
        if self.folder.is_pipeline:
            self._complete_pipeline()
        self.copied.complete = True
        self.copied.save(self.folder.path)
        return True

    def _start_pipeline(self) -> str:
        """Create the pipeline's parent run with its parameters and command, and return its id."""
        start, command = self.folder.start, self.folder.command
        tags = {
            **start["tags"], "stage": PIPELINE, "host": start["host"], "workspace": start["workspace"],
            "command": command, "mlflow.source.name": command, "mlflow.note.content": f"`{command}`",
        }  # fmt: skip
        named = time.strftime("pipeline %m-%d %H:%M:%S", time.localtime(start["time_ms"] / 1000))
        name = start["tags"].get("dvc.experiment", named)
        run_id = self.store.create("pipeline", self.folder.path.name, name, start["time_ms"], tags)
        params = parse_yaml(self.folder.before.read(PARAMS), PARAMS)
        self.store.log(run_id, [{"kind": "params", "values": journal.tuned_params(params)}])
        return run_id

    def _copy_journal(self, file: JournalFile) -> bool:
        """Copy one journal's new lines. Return whether the stage has ended and the journal is copied."""
        copied = Copied.load(file.folder, self.store.identity)
        if copied.complete:
            return True
        status = file.status  # before the lines are read: a live process can append lines
        lines, offset = file.read(copied.offset)
        if not copied.run_id:
            copied.run_id = self._start_stage(file)
        if not status:
            self.store.log(copied.run_id, self._monitor(file.start["pid"]).sample())
        self._log_stage(file, copied.run_id, lines)
        if status and file.folder == file.run()[-1].folder:  # else a later process resumed the run
            self.client.set_terminated(copied.run_id, status, file.last["time_ms"])
        copied.offset, copied.complete = offset, bool(status)
        copied.save(file.folder)
        return copied.complete

    def _start_stage(self, file: JournalFile) -> str:
        """Create a stage's run, or resume the one that its journal continues, and return its id.

        Earlier journals of a resumed run are copied again: the store or the pipeline's run may lack them.
        """
        parent = {"mlflow.parentRunId": self.copied.run_id} if self.copied.run_id else {}
        journals, stage = file.run(), file.start["stage"]
        script = f"stages/{stage.partition('@')[0]}.py"
        tags = {**file.start["tags"], **parent, "stage": stage, "mlflow.source.name": script}
        run_id = self.store.create("journal", file.first, stage, journals[0].start["time_ms"], tags)
        for earlier in journals:
            if earlier.start["time_ms"] < file.start["time_ms"]:
                self._log_stage(earlier, run_id, earlier.read()[0])
        if "continues" in file.start and file.folder == journals[-1].folder:
            self.store.log(run_id, [{"kind": "tags", "values": parent}])
            self.client.update_run(run_id, status="RUNNING")
        if not parent and self.folder.before.root.exists():
            self.store.log_folder(run_id, self.folder.before.root, BEFORE)
        return run_id

    def _log_stage(self, file: JournalFile, run_id: str, lines: list[dict[str, Any]]) -> None:
        """Log lines of a journal to the stage's run; log metrics and inputs to the pipeline's run, too."""
        skipped = "params" if "continues" in file.start else ""  # the run has its first journal's parameters
        self.store.log(run_id, [line for line in lines if line["kind"] != skipped])
        if parent := self.copied.run_id:
            self.store.log(parent, [line for line in lines if line["kind"] in ("metrics", "inputs")])
        for line in lines:
            if line["kind"] == "artifact" and (path := file.folder / line["path"]).is_dir():
                self.client.log_artifacts(run_id, str(path), f"{line['folder']}/{path.name}".lstrip("/"))
            elif line["kind"] == "artifact" and path.exists():
                self.client.log_artifact(run_id, str(path), line["folder"] or None)

    def _complete_pipeline(self) -> None:
        """Log the files that the `dvc` process left, close its run, and log the model if the run finished."""
        run_id, after, found = self.copied.run_id, self.folder.path / "after", self.folder.outcome()
        assert found is not None  # keep_after wrote it
        self.store.log_folder(run_id, after)
        outs, cache = pipeline_run.outs(Folder(after), found), Cache(self.folder.root)
        tags, datasets = pipeline_run.hashes(after, cache, outs)
        links, files = {}, {file.start["stage"]: file for file in self.folder.stages()}
        for stage, entry in found.entries.items():
            if stage in files:
                made_by = Copied.load(files[stage].folder).run_id
                self.client.set_tag(made_by, "lock_entry", entry)
            else:
                made_by = self.store.find("lock_entry", entry)
            if made_by:
                links[stage] = f"[run {made_by[:8]}](#/experiments/{self.store.experiment}/runs/{made_by})"
        tags["mlflow.note.content"] = pipeline_run.description(self.folder.command, found, links)
        begin = {"time_ms": self.folder.start["time_ms"]}
        lines = [line | begin for line in pipeline_run.skipped_metrics(after, found)]
        lines += [{"kind": "inputs", "datasets": datasets}, {"kind": "tags", "values": tags}]
        self.store.log(run_id, lines)
        end_ms = max(file.last["time_ms"] for file in self.folder.journals())
        self.client.set_terminated(run_id, found.status, end_ms)
        if found.status == "FINISHED" and "weights_sha256" in tags:
            from compactgpt.tracking import registry

            val = next((one["digest"] for one in datasets if one["name"] == "val.tokens"), "")
            trained = registry.Trained(run_id, cache, after, tags["weights_sha256"], val)
            self.client.set_tag(run_id, "model_id", registry.log_model(self.store, trained))


def follow(folder: RunFolder) -> None:
    """Copy a run folder until it is complete, or its store fails for PATIENCE_SECONDS after the runs' end."""
    logger, reported, last_work = None, set[str](), time.monotonic()
    with folder.locked() as is_alone:
        while is_alone and time.monotonic() - last_work < PATIENCE_SECONDS:
            try:
                if folder.journals():
                    folder.keep_after()  # first: this step needs no server
                    logger = logger or Logger(folder, open_store(folder.root, folder.start["store"]))
                    with store_errors(folder.start["store"]["uri"]):
                        if logger.copy():
                            return
                    last_work = time.monotonic()
            except (UserError, OSError) as error:
                logger = None
                if str(error) not in reported and len(reported) < MAX_REPORTED:
                    reported.add(str(error))
                    logging.exception("not copied; trying again")
                last_work = time.monotonic() if folder.alive else last_work
            time.sleep(POLL_SECONDS)


def sync(root: Path, *, record_unrun: bool = False) -> str:
    """Copy ended runs to their tracking stores, if an earlier copy is missing or incomplete.

    A run that can't be copied does not stop the other runs. `record_unrun` also logs a dvc.lock that no run
    in the store produced, as in a fresh clone. Return the address of the current store.

    Raises:
        MissingInput: dvc.yaml is missing.
        UserError: the first error, raised after all runs were tried.
    """
    if not (root / CHAIN).exists():
        raise MissingInput(f"{CHAIN} is missing in {root.resolve()}: run from the repository folder")
    problems: list[UserError] = []
    current, ended = tracking_store(), [one for one in run_folders(root) if not one.alive]
    for folder in ended:
        with suppress(UserError), folder.locked() as is_ours:  # else its child process does this
            if is_ours:
                folder.keep_after()
    if record_unrun and _has_all(root, ended, current):
        return current["uri"]
    stores = [current, *(folder.start["store"] for folder in ended)]
    for wanted in {json.dumps(store): store for store in stores}.values():
        folders = [one for one in ended if one.start["store"] == wanted]
        if wanted != current:
            folders = [one for one in folders if not Copied.load(one.path).complete]
        problems += _sync_store(root, wanted, folders, record_unrun=record_unrun and wanted == current)
    if problems:
        raise problems[0]
    return current["uri"]


def _has_all(root: Path, ended: list[RunFolder], store: dict[str, str]) -> bool:
    """Return whether a store has all runs, and a run of dvc.lock; without MLflow, whose import takes seconds.

    False for a server, which may have lost its runs.
    """
    if not (identity := saved_identity(root, store)):
        return False
    lock, has_lock = Folder(root).read(LOCK), False
    for folder in ended:
        if not Copied.load(folder.path).complete:
            return False
        with suppress(UserError):  # a damaged file
            if found := folder.outcome():
                is_of_lock = Folder(folder.path / "after").read(LOCK) == lock and found.status == "FINISHED"
                has_lock |= is_of_lock and Copied.load(folder.path, identity).complete
    return has_lock


def _sync_store(
    root: Path, wanted: dict[str, str], folders: list[RunFolder], *, record_unrun: bool
) -> list[UserError]:
    """Copy run folders to their store, and return the errors."""
    store, problems = None, []
    if waiting := sum(not Copied.load(folder.path).complete for folder in folders):
        report(f"copying {waiting} run{'s' * (waiting > 1)} to MLflow at {wanted['uri']}")
    try:
        for folder in folders:
            store = store or open_store(root, wanted)  # open again after a failure
            try:
                with store_errors(wanted["uri"]), folder.locked(wait=True):
                    if not Logger(folder, store).copy():
                        raise Busy("DVC has not written its files yet: run `compactgpt sync` again later")
            except UserError as problem:
                problems.append(problem)
                store = None
        if record_unrun:
            store = store or open_store(root, wanted)
            with store_errors(wanted["uri"]):
                _record_unrun(root, store)
    except UserError as problem:
        problems.append(problem)
    return problems


def _record_unrun(root: Path, store: Store) -> None:
    """Log a run in which DVC skipped every stage, as after `dvc pull` in a clone; once for each dvc.lock."""
    place = Folder(root)
    lock = hashlib.sha256(place.read(LOCK) or b"").hexdigest()
    if store.find("lock_sha256", lock, " and attributes.status = 'FINISHED'"):
        return
    found = pipeline_run.outcome(place, place, [], "dvc repro", root)
    if not found.stages or found.status != "FINISHED":  # `dvc repro` has something to do
        return
    tags = {**git_facts(root), **journal.machine_facts()}
    pipeline = {"pid": 0, "created": time.time(), "command": "dvc repro"}
    facts = {"tags": tags, "pipeline": pipeline, "workspace": str(root.resolve())}
    run = journal.Journal(root / ".state", PIPELINE, {**journal.process_facts(), **facts})
    run.keep_before(root)
    run.end("FINISHED")
    Logger(RunFolder(run.run_folder), store).copy()


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(journal.PasswordFilter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    follow(RunFolder(Path(sys.argv[1])))
