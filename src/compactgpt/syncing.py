"""Journals -> MLflow, in a process of its own.

`start_syncing` leaves one such process running; it copies every journal under `<root>/.state/tracking`
to MLflow as it grows, closes runs whose process died (KILLED), and ends some seconds after the last run.
What a dead server has not taken stays in the journal and is copied by the next one: nothing is lost, and
since every metric carries the journal's own time and step, nothing is doubled. `python -m
compactgpt.syncing` copies what is left and waits for it.

MLflow is the SQLite file `<root>/mlflow.db` unless MLFLOW_TRACKING_URI names a server.
"""

import fcntl
import json
import logging
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.storage import read_json, write_json
from compactgpt.tracking import now_ms

EXPERIMENT = "compactgpt"
POLL_SECONDS = 1.0
IDLE_SECONDS = 20.0  # how long the process stays for the next stage
PATIENCE_SECONDS = 120.0  # how long it tries a server that does not answer, once every run has ended
_MAX_METRICS = 1000  # in one request: MLflow's own limit
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a parameter
_NOT_IN_A_NAME = re.compile(r"[^\w\-./: ]")  # MLflow refuses the rest in names of metrics and parameters


def tracking_folder(root: Path) -> Path:
    """Where the journals of a repository lie."""
    return root / ".state" / "tracking"


def process_facts() -> dict[str, Any]:
    """What tells later whether this process still lives, and which `dvc` process runs it.

    Stages of the same `dvc` process share a parent run in MLflow.
    """
    import psutil

    own = psutil.Process()
    facts = {"host": platform.node(), "pid": own.pid, "created": own.create_time()}
    for parent in own.parents():
        try:
            if any(Path(word).name == "dvc" for word in parent.cmdline()[:3]):
                return {**facts, "pipeline": {"pid": parent.pid, "created": parent.create_time()}}
        except psutil.Error:
            continue
    return facts


def _alive(pid: int, created: float) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1)
    except psutil.NoSuchProcess:
        return False


def start_syncing(root: Path) -> None:
    """Leave a syncing process running, unless there is one."""
    folder = tracking_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as free:
        pass
    if not free:
        return
    with open(folder / "syncing.log", "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "compactgpt.syncing", "--follow", str(root)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Try to be the only syncing process of a folder; yields whether that worked."""
    with open(folder / "syncing.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclass
class _Run:
    """One journal on its way to MLflow."""

    folder: Path
    run_id: str = ""
    offset: int = 0  # bytes of the journal that MLflow has
    start: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "_Run":
        """Take up a journal where the last process left it."""
        with open(folder / "journal.jsonl", "rb") as file:
            start = json.loads(file.readline())
        state = folder / "synced.json"
        return cls(folder, **(read_json(state) if state.exists() else {}), start=start)

    def new_lines(self) -> tuple[list[dict[str, Any]], int]:
        """Whole lines that MLflow lacks, and the offset behind them; a torn last line waits."""
        with open(self.folder / "journal.jsonl", "rb") as file:
            file.seek(self.offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], self.offset + len(whole)

    def save(self) -> None:
        """Remember what MLflow has."""
        write_json(self.folder / "synced.json", {"run_id": self.run_id, "offset": self.offset})


def _name(key: str) -> str:
    return _NOT_IN_A_NAME.sub("_", key)


class Syncer:
    """Copies the journals of one repository to MLflow."""

    def __init__(self, root: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.root = root
        self.folder = tracking_folder(root)
        self._client: Any = None
        self._experiment = ""
        self._parents: dict[str, str] = {}

    def pending(self) -> list[Path]:
        """Journals that MLflow has not wholly taken, oldest first."""
        return sorted(path.parent for path in self.folder.glob("*/journal.jsonl") if path.stat().st_size)

    def sync(self) -> bool:
        """Copy what is new in every journal.

        Returns:
            Whether nothing is left: every run has ended and MLflow has all of it.
        """
        complete = True
        for folder in self.pending():
            complete &= self._sync_run(_Run.load(folder))
        return self._close_parents() and complete

    def _connect(self) -> Any:
        """Open the tracking store, making the SQLite file and the experiment where they are missing."""
        if self._client:
            return self._client
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        location = None
        if not uri:
            database = self.root / "mlflow.db"
            if not database.exists():
                with closing(sqlite3.connect(database)) as made:
                    made.execute("pragma journal_mode=wal")  # readers and the writer never wait long
            uri, location = f"sqlite:///{database}", (self.root / "mlartifacts").as_uri()
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, location)
        self._client, self._experiment = client, experiment
        self._adopt_parents()
        return client

    def _adopt_parents(self) -> None:
        """Take over the open parent runs of this machine that a killed syncing process left."""
        wanted = (
            f"tags.stage = 'pipeline' and tags.host = '{platform.node()}' and attributes.status = 'RUNNING'"
        )
        for run in self._client.search_runs([self._experiment], wanted):
            self._parents[run.data.tags["pipeline"]] = run.info.run_id

    def _sync_run(self, run: _Run) -> bool:
        """Copy one journal; a finished one is moved to `done/`. Returns whether it is finished."""
        lines, offset = run.new_lines()
        if not run.run_id:
            run.run_id = self._find_or_create(run)
        ended = self._copy(run, lines)
        run.offset = offset
        run.save()
        if not ended and _alive(run.start["pid"], run.start["created"]):
            return False
        if not ended:
            self._connect().set_terminated(run.run_id, "KILLED")
        done = self.folder / "done"
        done.mkdir(exist_ok=True)
        run.folder.rename(done / run.folder.name)
        return True

    def _find_or_create(self, run: _Run) -> str:
        start = run.start
        if run_id := self._find("journal", start.get("continues", "")):
            self._connect().update_run(run_id, status="RUNNING")
            return run_id
        tags = {**start["tags"], "stage": start["stage"], "journal": run.folder.name}
        if "pipeline" in start:
            parent = tags["mlflow.parentRunId"] = self._parent(start)
            if "data_sha256" in tags:  # known once the first stages have made the data
                self._connect().set_tag(parent, "data_sha256", tags["data_sha256"])
        return self._find("journal", run.folder.name) or self._create(start["stage"], start["time_ms"], tags)

    def _parent(self, start: dict[str, Any]) -> str:
        """The run of the whole `dvc repro` that a stage belongs to."""
        key = f"{start['pipeline']['pid']}-{start['pipeline']['created']}"
        self._connect()
        if key not in self._parents:
            tags = {**start["tags"], "stage": "pipeline", "pipeline": key, "host": start["host"]}
            found = self._find("pipeline", key)
            self._parents[key] = found or self._create("pipeline", start["time_ms"], tags)
        return self._parents[key]

    def _find(self, tag: str, value: str) -> str:
        if not value:
            return ""
        found = self._connect().search_runs([self._experiment], f"tags.`{tag}` = '{value}'", max_results=1)
        return found[0].info.run_id if found else ""

    def _create(self, name: str, time_ms: int, tags: dict[str, str]) -> str:
        run = self._connect().create_run(self._experiment, time_ms, tags, run_name=name)
        return str(run.info.run_id)

    def _copy(self, run: _Run, lines: list[dict[str, Any]]) -> bool:
        """Send journal lines in their order, metrics in batches. Returns whether the run has ended."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._connect()
        metrics = [
            Metric(_name(key), value, line["time_ms"], line["step"])
            for line in lines
            if line["kind"] == "metrics"
            for key, value in line["values"].items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            client.log_batch(run.run_id, metrics=metrics[start : start + _MAX_METRICS])
        for line in lines:
            if line["kind"] == "params" and "continues" not in run.start:  # MLflow's are written once
                params = [Param(_name(key), str(value)[:_MAX_VALUE]) for key, value in line["values"].items()]
                for start in range(0, len(params), _MAX_PARAMS):
                    client.log_batch(run.run_id, params=params[start : start + _MAX_PARAMS])
            elif line["kind"] == "tags":
                client.log_batch(run.run_id, tags=[RunTag(k, str(v)) for k, v in line["values"].items()])
            elif line["kind"] == "artifact":
                self._copy_artifact(run, line)
            elif line["kind"] == "end":
                client.set_terminated(run.run_id, line["status"], line["time_ms"])
        return any(line["kind"] == "end" for line in lines)

    def _copy_artifact(self, run: _Run, line: dict[str, Any]) -> None:
        path = run.folder / line["path"]
        if not path.exists():
            logging.warning("%s is gone; its run goes on without it", path)
        elif path.is_dir():
            target = f"{line['folder']}/{path.name}".lstrip("/")
            self._connect().log_artifacts(run.run_id, str(path), target)
        else:
            self._connect().log_artifact(run.run_id, str(path), line["folder"] or None)

    def _close_parents(self) -> bool:
        """End the parent runs whose `dvc` process is gone. Returns whether none is left open."""
        for key, run_id in list(self._parents.items()):
            pid, created = key.split("-")
            if _alive(int(pid), float(created)):
                continue
            children = self._connect().search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{run_id}'"
            )
            statuses = {child.info.status for child in children}
            status = "FINISHED" if statuses <= {"FINISHED"} else "FAILED"
            self._connect().set_terminated(run_id, status, now_ms())
            del self._parents[key]
        return not self._parents


def follow(root: Path) -> None:
    """Copy journals until every run has ended and no new one came for a while."""
    syncer = Syncer(root)
    with _lock(syncer.folder) as alone:
        if not alone:
            return
        last_work = time.monotonic()
        while True:
            try:
                complete = syncer.sync()
            except Exception:  # whatever a server or a store may throw: try again, lose nothing
                logging.exception("MLflow did not take it; trying again")
                complete = False
                syncer._client = None
                if time.monotonic() - last_work > PATIENCE_SECONDS:
                    return
            else:
                if not complete:
                    last_work = time.monotonic()
            if complete and time.monotonic() - last_work > IDLE_SECONDS:
                return
            time.sleep(POLL_SECONDS)


def drain(root: Path, patience_seconds: float = 60.0) -> bool:
    """Copy what is left of ended runs, waiting for a process that already does so.

    Returns:
        Whether MLflow has everything.
    """
    syncer = Syncer(root)
    syncer.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_seconds
    while syncer.pending() and time.monotonic() < deadline:
        with _lock(syncer.folder) as alone:
            if alone:
                syncer.sync()
        time.sleep(0.2)
    return not syncer.pending()


def main() -> None:
    """`--follow ROOT`: the process that a stage leaves running. Without: copy what is left here."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if sys.argv[1:2] == ["--follow"]:
        follow(Path(sys.argv[2]))
    elif not drain(Path.cwd()):
        sys.exit("MLflow has not taken everything yet; `python -m compactgpt.syncing` tries again")


if __name__ == "__main__":
    main()
