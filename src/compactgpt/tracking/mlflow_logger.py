"""Copy the journals of a run folder to MLflow in a child process.

In MLflow, a `dvc` process has a parent run, and each of its stages has a child run.
"""

import hashlib
import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.console import report
from compactgpt.common.errors import Busy, MissingInput, UserError
from compactgpt.common.git import git_facts
from compactgpt.common.storage import read_json, write_json, write_text
from compactgpt.tracking import journal, pipeline_run
from compactgpt.tracking.dvc_files import LOCK, PARAMS, STAGES, Cache, Folder, parse_yaml
from compactgpt.tracking.journal import BEFORE, DEFAULT_URI, JournalFile, tracking_folder, tracking_store
from compactgpt.tracking.pipeline_run import PIPELINE, RunFolder, run_folders
from compactgpt.tracking.store import Store, open_store, store_errors

POLL_SECONDS = 1.0  # time between two reads of the journals
PATIENCE_SECONDS = 60.0  # how long to retry after the last stage has ended, if MLflow fails


def start_logger(run_folder: Path) -> None:
    """Start a process that copies a run folder to MLflow, unless such a process already runs."""
    with RunFolder(run_folder).locked() as is_free:
        pass
    if is_free:
        with open(run_folder / "log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "compactgpt.tracking.mlflow_logger", str(run_folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                # The process works in the repository, because DVC may delete the folder of a stage.
                cwd=run_folder.parents[2],
            )  # fmt: skip


def copied_to(folder: RunFolder) -> str:
    """Return the `identity` of the `Store` that has a full copy of `folder`, or "" if no store has one."""
    note = folder.path / "mlflow.json"
    return str(read_json(note)["store"]) if note.exists() else ""


@dataclass
class Copied:
    """How much of one journal this process has copied to MLflow."""

    run_id: str  # id of the stage's run in MLflow
    offset: int = 0  # number of copied bytes, counted from the start of the journal
    is_complete: bool = False  # whether the stage has ended and all lines of its journal are copied


class Logger:
    """Copies the journals of one run folder to MLflow."""

    def __init__(self, folder: RunFolder, store: Store) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.run_id = ""  # the id of the pipeline's run in MLflow
        self.copied: dict[str, Copied] = {}  # name of a journal's folder -> MLflow run and copied bytes
        self.monitor: Any = None  # MLflow's monitor, which logs the system metrics of the running stage

    def copy(self) -> bool:
        """Copy new lines of all journals. Return False if `dvc` may still add lines or files, else True."""
        if copied_to(self.folder) == self.store.identity:
            return True
        is_pipeline = "pipeline" in self.folder.start
        if is_pipeline and not self.run_id:
            self.run_id = self._start_pipeline()
        done = [self._copy_journal(file) for file in self.folder.stages()]
        if not all(done) or self.folder.alive or not self.folder.keep_after():
            return False
        if is_pipeline:
            self._complete_pipeline()
        write_json(self.folder.path / "mlflow.json", {"store": self.store.identity})
        return True

    def close(self) -> None:
        """Stop MLflow's monitor of system metrics."""
        if self.monitor:
            self.monitor.finish()
        self.monitor = None

    def _start_pipeline(self) -> str:
        start = self.folder.start
        named = time.strftime("pipeline %m-%d %H:%M:%S", time.localtime(start["time_ms"] / 1000))
        name, command = start["tags"].get("dvc.experiment", named), self.folder.command
        tags = {
            **start["tags"], "stage": PIPELINE, "host": start["host"], "workspace": start["workspace"],
            "command": command, "mlflow.source.name": command, "mlflow.note.content": f"`{command}`",
        }  # fmt: skip
        run_id = self.store.create("pipeline", self.folder.path.name, name, start["time_ms"], tags)
        params = parse_yaml(self.folder.before.read(PARAMS), PARAMS)
        self.store.log(run_id, [{"kind": "params", "values": journal.tuned_params(params)}])
        return run_id

    def _copy_journal(self, file: JournalFile) -> bool:
        """Copy the new lines of one journal. Return whether its stage has ended and all lines are copied."""
        name = file.folder.name
        if name not in self.copied:
            self.copied[name] = Copied(self._start_stage(file))
        copied = self.copied[name]
        if copied.is_complete:
            return True
        # Read the status before the lines. In this order, no line of an ended stage can be missed.
        status = file.status
        if not status and not self.monitor:
            self.monitor = self.store.start_monitor(copied.run_id)
        lines, offset = file.read(copied.offset)
        # A restarted process logs all lines again. This is harmless, because MLflow stores a metric with the
        # same name, step, time and value only once.
        self.store.log(copied.run_id, lines)
        if self.run_id:
            self.store.log(self.run_id, [line for line in lines if line["kind"] in ("metrics", "inputs")])
        for line in (line for line in lines if line["kind"] == "artifact"):
            self.client.log_artifact(copied.run_id, str(file.folder / line["path"]), line["folder"] or None)
        if status:
            self.close()
            self.client.set_terminated(copied.run_id, status, file.last["time_ms"])
        copied.offset, copied.is_complete = offset, bool(status)
        return copied.is_complete

    def _start_stage(self, file: JournalFile) -> str:
        parent = {"mlflow.parentRunId": self.run_id} if self.run_id else {}
        stage = file.start["stage"]
        script = f"stages/{stage.partition('@')[0]}.py"
        tags = {**file.start["tags"], **parent, "stage": stage, "mlflow.source.name": script}
        run_id = self.store.create("journal", file.folder.name, stage, file.start["time_ms"], tags)
        if not parent and self.folder.before.root.exists():
            self.store.log_folder(run_id, self.folder.before.root, BEFORE)
        return run_id

    def _complete_pipeline(self) -> None:
        """Log the folder `after/` and the trained model to MLflow, and end the pipeline's run in MLflow."""
        after, found, cache = self.folder.after, self.folder.outcome(), Cache(self.folder.root)
        assert found is not None  # `keep_after` has saved the outcome
        self.store.log_folder(self.run_id, after.root)
        tags, datasets = pipeline_run.hashes(after, cache, pipeline_run.outs(after, found))
        if found.status != "FINISHED":
            del tags["lock_sha256"]  # `sync` must not find a failed run by this tag
        ran = {file.start["stage"]: self.copied[file.folder.name].run_id for file in self.folder.stages()}
        links = {}  # name of a stage -> link to the MLflow run that made its outputs
        for stage, entry in found.entries.items():
            if stage in ran:
                self.client.set_tag(ran[stage], "lock_entry", entry)
            if made_by := ran.get(stage) or self.store.find("lock_entry", entry):
                links[stage] = f"[run {made_by[:8]}](#/experiments/{self.store.experiment}/runs/{made_by})"
        tags["mlflow.note.content"] = pipeline_run.describe(self.folder.command, found, links)
        time_ms = {"time_ms": self.folder.start["time_ms"]}
        lines = [line | time_ms for line in pipeline_run.skipped_metrics(after.root, found)]
        lines += [{"kind": "inputs", "datasets": datasets}, {"kind": "tags", "values": tags}]
        self.store.log(self.run_id, lines)
        end_ms = max(file.last["time_ms"] for file in self.folder.journals())
        self.client.set_terminated(self.run_id, found.status, end_ms)
        if found.status == "FINISHED" and "weights_sha256" in tags:
            from compactgpt.tracking import registry

            val = next((one["digest"] for one in datasets if one["name"] == "val.tokens"), "")
            model_id = registry.log_model(self.store, self.run_id, after, cache, tags["weights_sha256"], val)
            self.client.set_tag(self.run_id, "model_id", model_id)


def follow(folder: RunFolder) -> None:
    """Copy new lines of a run folder to MLflow until all its stages have ended and are copied.

    Gives up if MLflow fails for PATIENCE_SECONDS after the last stage has ended.
    """
    logger, reported, last_work = None, "", time.monotonic()
    with folder.locked() as is_alone:
        while is_alone and time.monotonic() - last_work < PATIENCE_SECONDS:
            try:
                folder.keep_after()  # first, because `open_store` can fail
                logger = logger or Logger(folder, open_store(folder.root, folder.start["store"]))
                with store_errors(folder.start["store"]["uri"]):
                    if logger.copy():
                        return
                last_work = time.monotonic()
            except (UserError, OSError) as error:
                if logger:
                    logger.close()
                    logger = None
                if str(error) != reported:
                    reported = str(error)
                    logging.warning("the journals are not copied to MLflow yet, trying again: %s", error)
                last_work = time.monotonic() if folder.alive else last_work
            time.sleep(POLL_SECONDS)


def sync(root: Path) -> str:
    """Copy the run folders of all ended `dvc` processes to MLflow, and return the current store's address.

    Logs a run for the results in dvc.lock if the store has no run with these results.
    Continues after a failed copy, and raises the first error at the end.
    """
    if not (root / STAGES).exists():
        raise MissingInput(f"{STAGES} is missing in {root.resolve()}: run from the repository folder")
    problems: list[UserError] = []
    current, ended = tracking_store(), [one for one in run_folders(root) if not one.alive]
    for folder in ended:
        with suppress(UserError), folder.locked() as is_ours:
            if is_ours:
                folder.keep_after()
    # The import of MLflow takes seconds, so return before the import if mlflow.db has all runs.
    lock = hashlib.sha256(Folder(root).read(LOCK) or b"").hexdigest()
    note, content = tracking_folder(root) / "synced.json", json.dumps({**current, "lock_sha256": lock})
    is_local = current["uri"] == DEFAULT_URI and (root / "mlflow.db").exists()
    if is_local and note.exists() and note.read_text() == content and all(map(copied_to, ended)):
        return current["uri"]
    stores = [current, *(folder.start["store"] for folder in ended)]
    for wanted in {json.dumps(store): store for store in stores}.values():
        folders = [one for one in ended if one.start["store"] == wanted]
        if wanted != current:
            folders = [one for one in folders if not copied_to(one)]
        problems += _sync_store(root, wanted, folders)
    if problems:
        raise problems[0]
    if _log_missing_run(root, current, lock):
        write_text(note, content)
    return current["uri"]


def _sync_store(root: Path, wanted: dict[str, str], folders: list[RunFolder]) -> list[UserError]:
    """Copy `folders` to the store `wanted` (see `tracking_store`). Return the errors of failed copies."""
    problems = []
    if waiting := sum(not copied_to(folder) for folder in folders):
        report(f"copying {waiting} run{'s' * (waiting > 1)} to MLflow at {wanted['uri']}")
    store = None
    for folder in folders:
        try:
            store = store or open_store(root, wanted)
            with store_errors(wanted["uri"]), folder.locked(wait=True):
                if not Logger(folder, store).copy():
                    raise Busy("DVC has not saved the run's results yet: run `compactgpt sync` again later")
        except UserError as problem:
            problems.append(problem)
            if not store:  # the store can't be opened, so the next copies would fail, too
                break
    return problems


def _log_missing_run(root: Path, current: dict[str, str], lock: str) -> bool:
    """Create an MLflow run for the results in dvc.lock if MLflow has no such run.

    Returns whether MLflow has the run at the end. `lock` is the SHA-256 of dvc.lock.
    """
    place, store = Folder(root), open_store(root, current)
    with store_errors(current["uri"]):
        if store.find("lock_sha256", lock):
            return True
        found = pipeline_run.find_outcome(place, place, [], "dvc repro", root)
        if not found.stages or found.status != "FINISHED":
            return False  # create no run, because results of a stage are missing or out of date
        tags = {**git_facts(root), **journal.machine_facts()}
        pipeline = {"pid": 0, "created": time.time(), "command": "dvc repro"}
        facts = {"tags": tags, "pipeline": pipeline, "workspace": str(root.resolve())}
        run = journal.Journal(root / ".state", PIPELINE, {**journal.process_facts(), **facts})
        run.keep_before(root)
        run.end("FINISHED")
        return Logger(RunFolder(run.run_folder), store).copy()


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    follow(RunFolder(Path(sys.argv[1])))
