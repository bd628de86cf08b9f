"""Journals -> MLflow, in a child process.

`start_logger` leaves one such process for each run folder: it copies the journals as they grow, samples the
machine, closes runs whose process died (KILLED), completes the run of the `dvc` process when that has ended,
and ends. What a dead server has not taken stays in the journal; `compactgpt sync` copies it. Each journal
notes which store has taken how much of it. Copying again changes nothing: metrics carry the journal's own
time and step. Runs go to the store that the journal names, and to no other.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.common.errors import Busy, MissingInput, UserError
from compactgpt.common.git import DIFF, git_facts
from compactgpt.common.storage import read_json
from compactgpt.tracking import pipeline_run
from compactgpt.tracking.dvc_files import (
    CHAIN,
    LOCK,
    PARAMS,
    Cache,
    Chain,
    Folder,
    entry_key,
    parse_yaml,
    read_chain,
)
from compactgpt.tracking.journal import (
    BEFORE,
    DEFAULT_URI,
    Journal,
    journal_lines,
    machine_facts,
    process_facts,
    run_journals,
    tracking_store,
    without_password,
)
from compactgpt.tracking.run_folder import (
    PIPELINE,
    Copied,
    RunFolder,
    first_line,
    is_alive,
    last_line,
    run_folders,
)
from compactgpt.tracking.store import Store, open_store, store_errors
from compactgpt.tracking.system_metrics import SystemMetrics

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # for a store that fails, once the runs have ended
MAX_LOG = 1_000_000  # bytes of a run folder's log
MODEL_TRIES = 3  # a model that MLflow does not take is given up: DVC keeps its files
_MAX_BATCH = 1000  # metrics in one request: MLflow's limit
_MAX_DIGEST = 36  # characters of a data set's digest


def start_logger(run_folder: Path) -> None:
    """Leave a process running that copies a run folder, unless there is one."""
    with RunFolder(run_folder).locked() as free:
        pass
    if not free:
        return
    path = run_folder / "log"
    with open(path, "ab" if path.exists() and path.stat().st_size < MAX_LOG else "wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "compactgpt.tracking.mlflow_logger", str(run_folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            cwd=run_folder.parents[2],  # not an experiment's scratch folder, which DVC removes
        )  # fmt: skip


class Logger:
    """Copies one run folder to its store."""

    def __init__(self, folder: RunFolder, store: Store) -> None:
        self.folder, self.store, self.client = folder, store, store.client
        self.copied = Copied.load(folder.path, store.identity)
        self._monitors: dict[Path, SystemMetrics] = {}

    def copy(self) -> bool:
        """Copy what is new; whether everything is copied, and nothing more will come."""
        if self.copied.complete:
            return True
        if self.folder.is_pipeline and not self.copied.run_id:
            self.copied.run_id = self._start_pipeline()
            self.copied.save()
        done = [self._copy_journal(journal) for journal in self.folder.stages()]
        if not all(done) or self.folder.alive or not self.folder.keep_after():
            return False
        if self.folder.is_pipeline:
            self._complete_pipeline()
        self.copied.complete = True
        self.copied.save()
        return True

    def _create(self, tag: str, key: str, name: str, time_ms: int, tags: Mapping[str, str]) -> str:
        """Return the run with a tag; create it as `mlflow.start_run` does, which takes no start time."""
        from mlflow.tracking.context.registry import resolve_tags

        if run_id := self.store.find(tag, key):
            return run_id
        tags = resolve_tags({**tags, tag: key, "mlflow.runName": name})  # user, source type, commit
        return str(self.client.create_run(self.store.experiment, time_ms, tags, name).info.run_id)

    def _start_pipeline(self) -> str:
        """Create the parent run with what is known at the start: parameters, files, command."""
        import mlflow

        start, command = self.folder.start, self.folder.command
        tags = {
            **start["tags"], "stage": PIPELINE, "host": start["host"], "workspace": start["workspace"],
            "command": command, "mlflow.source.name": command, "mlflow.note.content": f"`{command}`",
        }  # fmt: skip
        named = time.strftime("pipeline %m-%d %H:%M:%S", time.localtime(start["time_ms"] / 1000))
        name = start["tags"].get("dvc.experiment", named)
        run_id = self._create("pipeline", self.folder.path.name, name, start["time_ms"], tags)
        if params := parse_yaml(self.folder.before.read(PARAMS), PARAMS):
            mlflow.log_params(pipeline_run.tuned_params(params), run_id=run_id)
        if self.folder.before.root.exists():
            self._log_folder(self.folder.before.root, BEFORE, run_id)
        return run_id

    def _log_folder(self, folder: Path, target: str | None, run_id: str) -> None:
        import mlflow

        mlflow.log_artifacts(str(folder), target, run_id)
        if (folder / DIFF).exists():  # once more by itself: `log_artifacts` drops the mode of files
            mlflow.log_artifact(str(folder / DIFF), target, run_id)

    def _copy_journal(self, folder: Path) -> bool:
        """Copy one journal; whether it is copied and closed."""
        copied, start = Copied.load(folder, self.store.identity), first_line(folder)
        if copied.complete:
            return True
        alive = is_alive(start["pid"], start["created"])  # asked first: a living process writes on
        with open(folder / "journal.jsonl", "rb") as file:
            file.seek(copied.offset)
            raw = file.read()
        if not copied.run_id:
            self._start_stage(folder, start, copied)
        samples = self._monitors.setdefault(folder, SystemMetrics(start["pid"])).due() if alive else []
        lines = journal_lines(raw)
        self._log(folder, copied, [*lines, *samples])
        end = next((line for line in lines if line["kind"] == "end"), None)
        if end or not alive:
            status, time_ms = (end or {}).get("status", "KILLED"), last_line(folder)["time_ms"]
            self.client.set_terminated(copied.run_id, status, time_ms)
            copied.complete = True
        copied.offset += raw.rfind(b"\n") + 1
        copied.save()
        return copied.complete

    def _start_stage(self, folder: Path, start: Mapping[str, Any], copied: Copied) -> None:
        """Create a stage's run below the pipeline's, or resume the run that the journal continues."""
        parent = self.copied.run_id
        nested = {"mlflow.parentRunId": parent} if parent else {}
        if run_id := self.store.find("journal", first := start.get("continues", "")):
            self._log_tags(run_id, nested)
            self.client.update_run(run_id, status="RUNNING")
            copied.run_id, copied.resumed = run_id, True
            for earlier in run_journals(self.folder.path.parent, first) if parent else ():
                self._log_metrics([parent], journal_lines((earlier / "journal.jsonl").read_bytes()))
            return
        script = f"stages/{start['stage'].partition('@')[0]}.py"
        tags = {**start["tags"], **nested, "stage": start["stage"], "mlflow.source.name": script}
        copied.run_id = self._create("journal", folder.name, start["stage"], start["time_ms"], tags)
        if not parent and self.folder.before.root.exists():
            self._log_folder(self.folder.before.root, BEFORE, copied.run_id)

    def _log(self, folder: Path, copied: Copied, lines: list[dict[str, Any]]) -> None:
        """Log journal lines; what a stage measured and read is also the pipeline's."""
        import mlflow

        run_id, parent = copied.run_id, self.copied.run_id
        targets = [run_id, parent] if parent else [run_id]
        self._log_metrics([run_id], lines)
        self._log_metrics(targets[1:], [line for line in lines if not line.get("system")])
        for line in lines:
            if line["kind"] == "params" and not copied.resumed:
                mlflow.log_params(line["values"], run_id=run_id)
            elif line["kind"] == "tags":
                self._log_tags(run_id, line["values"])
            elif line["kind"] == "inputs":
                for target in targets:
                    self._log_inputs(target, line["datasets"])
            elif line["kind"] == "artifact" and (path := folder / line["path"]).is_dir():
                mlflow.log_artifacts(str(path), f"{line['folder']}/{path.name}".lstrip("/"), run_id)
            elif line["kind"] == "artifact" and path.exists():
                mlflow.log_artifact(str(path), line["folder"] or None, run_id)

    def _log_metrics(self, run_ids: list[str], lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, line["time_ms"], line["step"])
            for line in lines
            if line["kind"] == "metrics"
            for key, value in line["values"].items()
        ]
        for run_id in run_ids:
            for first in range(0, len(metrics), _MAX_BATCH):
                self.client.log_batch(run_id, metrics=metrics[first : first + _MAX_BATCH])

    def _log_tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])

    def _log_inputs(self, run_id: str, datasets: list[dict[str, str]]) -> None:
        """Name the data that a run read; MLflow takes a part of the hash, the profile has the whole."""
        from mlflow.entities import DatasetInput, InputTag

        inputs = [
            DatasetInput(dataset_entity(one), [InputTag("mlflow.data.context", one["context"])])
            for one in datasets
        ]
        self.client.log_inputs(run_id, inputs)

    def _complete_pipeline(self) -> None:
        """Log what a `dvc` process left, and its model if it finished; close its run."""
        run_id, after = self.copied.run_id, self.folder.path / "after"
        found, start_ms = read_json(self.folder.path / "outcome.json"), self.folder.start["time_ms"]
        made_by = self._made_by(found)
        self._log_folder(after, None, run_id)
        skipped = pipeline_run.skipped_metrics(after, found)
        lines = [
            {"kind": "metrics", "time_ms": start_ms, "step": step, "values": new} for step, new in skipped
        ]
        self._log_metrics([run_id], lines)
        chain, cache = pipeline_run.kept_chain(Folder(after), found), Cache(self.folder.root)
        tags, datasets = pipeline_run.hashes(after, chain, cache, found)
        self._log_inputs(run_id, datasets)
        if found["status"] == "FINISHED" and "weights_sha256" in tags:
            tags |= self._log_model(chain, cache, tags, datasets, made_by)
        address = f"#/experiments/{self.store.experiment}/runs/"
        links = {stage: f"[run {made[:8]}]({address}{made})" for stage, made in made_by.items() if made}
        tags["mlflow.note.content"] = pipeline_run.description(self.folder.command, found, links)
        self._log_tags(run_id, tags)
        end_ms = max(last_line(folder)["time_ms"] for folder in self.folder.journals())
        self.client.set_terminated(run_id, found["status"], end_ms)

    def _made_by(self, found: Mapping[str, Any]) -> dict[str, str]:
        """Return by stage the run that made what dvc.lock has; runs of this pipeline get the tag for it."""
        made_by = {one.stage: Copied.load(one.folder).run_id for one in self.folder.stage_runs()}
        for stage, (_, key) in found["stages"].items():
            if stage in made_by and key:
                self.client.set_tag(made_by[stage], "lock_entry", key)
            elif key:
                made_by[stage] = self.store.find("lock_entry", key)
        return made_by

    def _log_model(
        self,
        chain: Chain,
        cache: Cache,
        tags: Mapping[str, str],
        datasets: list[dict[str, str]],
        made_by: Mapping[str, str],
    ) -> dict[str, str]:
        """Log the model of a whole pipeline; returns tags of its run."""
        if self.copied.model_tries >= MODEL_TRIES:
            return {"model": f"not logged: {self.folder.path}/log has the reason"}
        self.copied.model_tries += 1
        self.copied.save()
        from compactgpt.tracking import registry

        made = registry.Trained(
            chain, cache, self.folder.path / "after", tags["weights_sha256"], datasets,
            made_by.get("training") or self.copied.run_id, self.copied.run_id,
        )  # fmt: skip
        return {"model_id": registry.log_model(self.store, made)}


def dataset_entity(one: Mapping[str, str]) -> Any:
    """Return a data set of `Tracker.inputs` as MLflow's entity."""
    from mlflow.entities import Dataset

    profile = json.dumps({"sha256": one["digest"], "bytes": one.get("bytes", "")})
    source = json.dumps({"uri": one["source"]})
    return Dataset(one["name"], one["digest"][:_MAX_DIGEST], "local", source, profile=profile)


def follow(folder: RunFolder) -> None:
    """Copy a run folder until it is complete, or its store fails for PATIENCE_SECONDS after the end."""
    logger, reported, last_work = None, "", time.monotonic()
    with folder.locked() as alone:
        while alone and time.monotonic() - last_work < PATIENCE_SECONDS:
            try:
                if folder.journals():
                    folder.keep_after()  # before anything that a dead server can stop
                    with store_errors(folder.start["store"]["uri"]):
                        logger = logger or Logger(folder, open_store(folder.root, folder.start["store"]))
                        if logger.copy():
                            return
                    last_work = time.monotonic()
            except (UserError, OSError) as error:
                logger = None
                if str(error) != reported:
                    logging.exception("not copied; trying again")
                reported = str(error)
                last_work = time.monotonic() if folder.alive else last_work
            time.sleep(POLL_SECONDS)


def sync(root: Path, patience_seconds: float = 60.0, *, record_unrun: bool = False) -> None:
    """Copy what the stores lack of the runs that have ended, waiting for processes that already do so.

    Runs that the store of the environment once had are copied again if that was deleted.

    Args:
        root: the repository.
        patience_seconds: how long to wait for another process.
        record_unrun: log a dvc.lock that no run has made, such as that of a fresh clone.

    Raises:
        MissingInput: this is not the folder of a repository.
        BadData: the store is damaged.
        Unreachable: a store does not answer, or refuses.
        Busy: another process still copies.
    """
    if not (root / CHAIN).exists():
        raise MissingInput(f"{CHAIN} is missing in {root.resolve()}: run from the repository folder")
    problems: dict[str, UserError] = {}
    stores = [tracking_store(), *(folder.start["store"] for folder in run_folders(root))]
    for key, wanted in {json.dumps(store): store for store in stores}.items():
        folders = [one for one in run_folders(root) if one.start["store"] == wanted and not one.alive]
        current = wanted == tracking_store()
        left = [one for one in folders if current or not Copied.load(one.path).complete]
        if key in problems or not (left or (current and record_unrun)):
            continue
        try:
            for one in left:
                with one.locked() as is_ours:  # a child process that still copies keeps it itself
                    if is_ours:
                        one.keep_after()
            with store_errors(wanted["uri"]):
                store = open_store(root, wanted)
                for one in left:
                    _copy_now(one, store, patience_seconds)
                if current and record_unrun:
                    _record_unrun(root, store)
        except UserError as problem:
            problems[key] = problem
    if problems:
        raise next(iter(problems.values()))


def _copy_now(folder: RunFolder, store: Store, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        with folder.locked() as alone:
            if alone and Logger(folder, store).copy():
                return
        time.sleep(POLL_SECONDS / 5)
    raise Busy(
        "another process still copies runs to MLflow, or DVC is not done: run `compactgpt sync` again later"
    )


def _record_unrun(root: Path, store: Store) -> None:
    """Log the run of a `dvc repro` that had nothing to do, once a dvc.lock."""
    lock = Folder(root).read(LOCK) or b""
    made = store.find("lock_sha256", hashlib.sha256(lock).hexdigest(), " and attributes.status = 'FINISHED'")
    if made or not read_chain(Folder(root)).complete:
        return
    stages = pipeline_run.outcome(Folder(root), root, [])["stages"]
    if any(
        what == pipeline_run.NOT_REACHED for what, _ in stages.values()
    ):  # `dvc repro` has something to do
        return
    pipeline = {"pid": 0, "created": time.time(), "command": "dvc repro"}
    tags = {**git_facts(root), **machine_facts()}
    facts = {**process_facts(), "pipeline": pipeline, "tags": tags, "workspace": str(root.resolve())}
    journal = Journal(root / ".state", PIPELINE, facts)
    journal.keep_before(root)
    journal.end("FINISHED")
    Logger(RunFolder(journal.run_folder), store).copy()


def run_of_value(root: Path, stage: str) -> str:
    """Return which run made what dvc.lock has of a stage, or why none is known."""
    wanted = tracking_store()
    if wanted["uri"] == DEFAULT_URI and not (root / "mlflow.db").exists():
        return "no MLflow store here: `make repro` keeps one"
    if wanted["uri"] == DEFAULT_URI and not os.access(root, os.W_OK):
        return "not looked up: SQLite writes next to mlflow.db, and this folder is read-only"
    entry = read_chain(Folder(root)).entries.get(stage)
    with store_errors(wanted["uri"]):
        run_id = open_store(root).find("lock_entry", entry_key(entry)) if entry else ""
    return f"{run_id} ({stage})" if run_id else f"no run in the store made what dvc.lock has of {stage}"


class PasswordFilter(logging.Formatter):
    """Leaves user and password of an address out: MLflow's errors quote MLFLOW_TRACKING_URI."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record with its traceback."""
        return without_password(super().format(record))


def main() -> None:
    """Follow the run folder that the one argument names."""
    handler = logging.StreamHandler()
    handler.setFormatter(PasswordFilter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    follow(RunFolder(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
