"""Journals -> MLflow, in a process of its own.

`start_syncing` leaves one such process running; it copies every journal under `<root>/.state/tracking`
to MLflow as it grows, samples the machine meanwhile, closes runs whose process died (KILLED), and ends some
seconds after the last run. What a dead server has not taken stays in the journal and is copied by the next
one: nothing is lost, and since every metric carries the journal's own time and step, nothing is doubled.
When a `dvc` process has ended, its run gets what compactgpt.pipelines found, and the model is logged
(compactgpt.registry). `compactgpt sync` copies what is left and waits for it.

MLflow is the SQLite file `<root>/mlflow.db` unless MLFLOW_TRACKING_URI names a server.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.git import DIFF, git_facts, uncommitted, write_private
from compactgpt.errors import Unreachable, UserError
from compactgpt.gauges import Gauge
from compactgpt.lineage import LOCK, Cache, Commit, Folder, Place, experiment_commit, read_chain
from compactgpt.pipelines import Child, Ending, conclude, note, write_files
from compactgpt.storage import read_json, write_json, write_text
from compactgpt.tracking import journal_lines, machine_facts, now_ms

EXPERIMENT = "compactgpt"
POLL_SECONDS = 1.0
IDLE_SECONDS = 20.0  # how long the process stays for the next stage
PATIENCE_SECONDS = 120.0  # how long it tries a server that does not answer, once every run has ended
_MAX_METRICS = 1000  # in one request: MLflow's own limit
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a parameter
_END_BYTES = 200  # more than the last line of a journal has
_MAX_DIGEST = 36  # characters of a data set's digest
# Okabe and Ito 2008, Color Universal Design: told apart by all eyes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
_KIND = ("mlflow.experimentKind", "custom_model_development")  # what MLflow calls this kind of work
_TOLD = "told"  # file with the hash of the dvc.lock that was concluded last
_MODEL_TRIES = 3  # a model that MLflow does not take is given up: its files are in DVC's cache
_IN_ADDRESS = re.compile(r"(://)[^/\s]+@")
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
            words = parent.cmdline()
            place = next((i for i, word in enumerate(words[:3]) if Path(word).name == "dvc"), None)
            if place is not None:
                command = " ".join(["dvc", *words[place + 1 :]])
                pipeline = {"pid": parent.pid, "created": parent.create_time(), "command": command}
                return {**facts, "pipeline": pipeline}
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
            cwd=root,  # an experiment's scratch folder goes, and MKL ends a process whose folder is gone
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
    sampled: int = 0  # bytes of the samples that it has
    start: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "_Run":
        """Take up a journal where the last process left it."""
        with open(folder / "journal.jsonl", "rb") as file:
            start = json.loads(file.readline())
        state = folder / "synced.json"
        return cls(folder, **(read_json(state) if state.exists() else {}), start=start)

    @property
    def alive(self) -> bool:
        """Whether the process that writes the journal lives."""
        return _alive(self.start["pid"], self.start["created"])

    @property
    def ended(self) -> bool:
        """Whether the journal is closed: its last line says so."""
        with open(self.folder / "journal.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            return b'{"kind": "end"' in file.read().splitlines()[-1]

    @property
    def pipeline(self) -> str:
        """Names the `dvc` process that the stage is part of."""
        return _key(self.start["pipeline"]) if "pipeline" in self.start else ""

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines that MLflow lacks, of the journal and of the samples; `save` counts them as taken."""
        told, self.offset = _whole_lines(self.folder / "journal.jsonl", self.offset)
        seen, self.sampled = _whole_lines(self.folder / "system.jsonl", self.sampled)
        return [*seen, *told]

    def sample(self, gauge: Gauge) -> None:
        """Write down what the machine does."""
        step, values = gauge.look()
        line = {"kind": "metrics", "time_ms": now_ms(), "step": step, "values": values}
        with open(self.folder / "system.jsonl", "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def save(self) -> None:
        """Remember what MLflow has."""
        state = {"run_id": self.run_id, "offset": self.offset, "sampled": self.sampled}
        write_json(self.folder / "synced.json", state)


def _whole_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from a place on, and the place behind them; a torn last line waits."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.read()
    return journal_lines(raw), offset + raw.rfind(b"\n") + 1


def _begins(journal: Path) -> bool:
    """Whether a journal says whose it is; one that never will again, after a power loss, is let lie."""
    with open(journal, "rb") as file:
        return bool(journal_lines(file.readline()))


def _key(pipeline: dict[str, Any]) -> str:
    return f"{pipeline['pid']}-{pipeline['created']}"


@dataclass
class _Parent:
    """The run of a `dvc` process, until it has been concluded."""

    folder: Path  # named by the process; holds dvc.lock as its first stage found it, and changes to the code
    run_id: str  # in MLflow; nothing until that has answered
    time_ms: int
    workspace: str
    experiment: str = ""  # DVC's name for it
    model_tries: int = 0

    @classmethod
    def load(cls, folder: Path) -> "_Parent":
        return cls(folder, **read_json(folder / "parent.json"))

    def save(self) -> None:
        facts = {key: value for key, value in vars(self).items() if key != "folder"}
        write_json(self.folder / "parent.json", facts)

    @property
    def left(self) -> Path:
        """What the process left, once it has ended: see `pipelines.write_files`."""
        return self.folder / "left"

    @property
    def alive(self) -> bool:
        """Whether the `dvc` process lives."""
        pid, _, created = self.folder.name.partition("-")
        return pid.isdigit() and _alive(int(pid), float(created))


def _name(key: str) -> str:
    return _NOT_IN_A_NAME.sub("_", key)


class Syncer:
    """Copies the journals of one repository to MLflow."""

    def __init__(self, root: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A request that was taken, but not answered, must not be sent again unseen: `sync` looks first.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.root = root.resolve()
        self.folder = tracking_folder(self.root)
        self._client: Any = None
        self._experiment = ""
        self._gauges: dict[Path, Gauge] = {}
        self._gpus: Any = None

    def pending(self) -> list[Path]:
        """Journals that MLflow has not wholly taken, oldest first."""
        return sorted(path.parent for path in self.folder.glob("*/journal.jsonl") if _begins(path))

    def parents(self) -> list[_Parent]:
        """The runs of `dvc` processes that are still to be concluded."""
        return [_Parent.load(path.parent) for path in sorted(self.folder.glob("pipelines/*/parent.json"))]

    def left(self) -> bool:
        """Whether something waits that no living process will add to."""
        runs = [_Run.load(folder) for folder in self.pending()]
        done = [run.ended or not run.alive for run in runs] + [not one.alive for one in self.parents()]
        return any(done)

    def sync(self) -> bool:
        """Copy what is new in every journal.

        Returns:
            Whether nothing is left: every run has ended and MLflow has all of it.
        """
        complete = True
        self._sample()
        self._note_pipelines()
        for folder in self.pending():
            complete &= self._sync_run(_Run.load(folder))
        return self._conclude_parents() and complete

    def _sample(self) -> None:
        """Look at the machine, where a stage runs."""
        for folder in self.pending():
            run = _Run.load(folder)
            if folder not in self._gauges:
                self._gpus = self._gpus or gpu_monitor()
                self._gauges[folder] = Gauge(run.start["pid"], self._gpus)
            elif self._gauges[folder].due() and run.alive:
                run.sample(self._gauges[folder])

    def connect(self) -> tuple[Any, str]:
        """Open the tracking store, making the SQLite file and the experiment where they are missing.

        Returns:
            MLflow's client, and the id of the project's experiment.
        """
        if self._client:
            return self._client, self._experiment
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
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, location)
        if not found or _KIND[0] not in found.tags:
            client.set_experiment_tag(experiment, *_KIND)
        self._client, self._experiment = client, experiment
        self._adopt_parents()
        return client, experiment

    def _adopt_parents(self) -> None:
        """Close the parent runs of this machine that nobody knows any more: their state was deleted."""
        wanted = "tags.stage = 'pipeline' and attributes.status = 'RUNNING'"
        known = {parent.folder.name for parent in self.parents()}
        for run in self._client.search_runs([self._experiment], wanted):
            tags = run.data.tags
            ours = (tags.get("host"), tags.get("workspace")) == (platform.node(), str(self.root))
            pid, _, created = tags.get("pipeline", "").partition("-")
            alive = pid.isdigit() and _alive(int(pid), float(created))
            if ours and not alive and tags.get("pipeline") not in known:
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _sync_run(self, run: _Run) -> bool:
        """Copy one journal; a finished one is moved to `done/`. Returns whether it is finished."""
        alive = run.alive  # asked first: what a living process still writes is read at the next look
        lines = run.new_lines()
        if not run.run_id:
            run.run_id = self._find_or_create(run)
        ended = self._copy(run, lines)
        run.save()
        if not ended and alive:
            return False
        if not ended:
            self.connect()[0].set_terminated(run.run_id, "KILLED")
        done = self.folder / "done"
        done.mkdir(exist_ok=True)
        run.folder.rename(done / run.folder.name)
        self._gauges.pop(run.folder, None)
        return True

    def _find_or_create(self, run: _Run) -> str:
        start = run.start
        if run_id := self._find("journal", start.get("continues", "")):
            if run.pipeline:  # it belongs to the `dvc repro` that goes on with it
                self.connect()[0].set_tag(run_id, "mlflow.parentRunId", self._parent(run))
            self.connect()[0].update_run(run_id, status="RUNNING")
            return run_id
        tags = {**start["tags"], "stage": start["stage"], "journal": run.folder.name}
        tags["mlflow.source.name"] = f"stages/{start['stage'].partition('@')[0]}.py"
        if run.pipeline:
            parent = tags["mlflow.parentRunId"] = self._parent(run)
            for name in ("data_sha256", "weights_sha256"):  # known once a stage has made them
                if name in tags:
                    self.connect()[0].set_tag(parent, name, tags[name])
        return self._find("journal", run.folder.name) or self._create(start["stage"], start["time_ms"], tags)

    def _parent(self, run: _Run) -> str:
        """The run of the whole `dvc repro` that a stage belongs to."""
        parent = _Parent.load(self.folder / "pipelines" / run.pipeline)
        if parent.run_id:
            return parent.run_id
        start = run.start
        facts = {"host": start["host"], "workspace": parent.workspace, "stage": "pipeline"}
        facts["pipeline"] = run.pipeline
        facts["command"] = facts["mlflow.source.name"] = start["pipeline"].get("command", "dvc")
        facts["mlflow.runColor"] = self._next_colour()
        name = parent.experiment or _pipeline_name(start["time_ms"])
        found = self._find("pipeline", run.pipeline)
        parent.run_id = found or self._create(name, start["time_ms"], {**start["tags"], **facts})
        parent.save()
        return parent.run_id

    def _next_colour(self) -> str:
        """Another than that of the pipelines before: MLflow's own choice often gives neighbours the same."""
        client, experiment = self.connect()
        before = client.search_runs([experiment], "tags.stage = 'pipeline'", max_results=1000)
        return COLOURS[len(before) % len(COLOURS)]

    def _note_pipelines(self) -> None:
        """Write down which `dvc` processes there are, and keep what each left as soon as it has ended.

        All on this disk: a server that is away must not make us read the work tree of a later run.
        """
        for run in map(_Run.load, self.pending()):
            folder = self.folder / "pipelines" / run.pipeline
            if run.pipeline and not (folder / "parent.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                workspace = run.start.get("workspace", str(self.root))
                experiment = run.start["tags"].get("dvc.experiment", "")
                _Parent(folder, "", run.start["time_ms"], workspace, experiment).save()
        for parent in self.parents():
            if not parent.alive and not parent.left.exists():
                self._keep_what_is_left(parent)

    def _keep_what_is_left(self, parent: _Parent) -> None:
        for folder in self._journals_since(parent.time_ms):
            if _Run.load(folder).pipeline != parent.folder.name:
                continue
            for name, kept in [(f"before/{LOCK}", LOCK), (DIFF, DIFF)]:
                if (logged := folder / "artifacts" / name).exists() and not (parent.folder / kept).exists():
                    shutil.copy(logged, parent.folder / kept)
        making = parent.left.with_suffix(".tmp")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        try:
            write_files(self._place(parent), Cache(self.root), making)
        except UserError:
            logging.exception("not all that the pipeline left can be kept")
        if (diff := parent.folder / DIFF).exists():
            shutil.copy(diff, making / DIFF)
        making.rename(parent.left)

    def _journals_since(self, time_ms: int) -> list[Path]:
        """Journals, copied or not, that were begun at a time or later; the oldest first."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time_ms / 1000))
        found = [
            path.parent for path in self.folder.glob("done/*/journal.jsonl") if path.parent.name >= stamp
        ]
        return sorted([*found, *self.pending()], key=lambda folder: folder.name)

    def _find(self, tag: str, value: str, further: str = "") -> str:
        """The newest run with a tag, or nothing."""
        if not value:
            return ""
        client, experiment = self.connect()
        wanted, newest = f"tags.`{tag}` = '{value}'{further}", ["attributes.start_time DESC"]
        found = client.search_runs([experiment], wanted, max_results=1, order_by=newest)
        return str(found[0].info.run_id) if found else ""

    def _create(self, name: str, time_ms: int, tags: dict[str, str]) -> str:
        client, experiment = self.connect()
        return str(client.create_run(experiment, time_ms, tags, run_name=name).info.run_id)

    def _copy(self, run: _Run, lines: list[dict[str, Any]]) -> bool:
        """Send journal lines in their order, metrics in batches. Returns whether the run has ended."""
        client = self.connect()[0]
        told = [line for line in lines if line["kind"] == "metrics"]
        self._log_metrics(run.run_id, [(line["time_ms"], line["step"], line["values"]) for line in told])
        for line in lines:
            if line["kind"] == "params" and "continues" not in run.start:  # MLflow's are written once
                self._log_params(run.run_id, line["values"])
            elif line["kind"] == "tags":
                self._log_tags(run.run_id, line["values"])
            elif line["kind"] == "inputs":
                self._log_inputs(run.run_id, line["datasets"])
            elif line["kind"] == "artifact":
                self._copy_artifact(run, line)
            elif line["kind"] == "end":
                client.set_terminated(run.run_id, line["status"], line["time_ms"])
        return any(line["kind"] == "end" for line in lines)

    def _log_metrics(self, run_id: str, told: list[tuple[int, int, dict[str, float]]]) -> None:
        """Send (time in ms, step, values): what MLflow has already is not doubled."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(key), value, time_ms, step)
            for time_ms, step, values in told
            for key, value in values.items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self.connect()[0].log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS])

    def _log_params(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_name(key), str(value)[:_MAX_VALUE]) for key, value in values.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self.connect()[0].log_batch(run_id, params=params[start : start + _MAX_PARAMS])

    def _log_tags(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.connect()[0].log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])

    def _log_inputs(self, run_id: str, datasets: list[dict[str, str]]) -> None:
        """Name the data that a run read; MLflow takes a part of the hash, the whole is in the profile."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=one["name"],
                    digest=one["digest"][:_MAX_DIGEST],
                    source_type="local",
                    source=json.dumps({"uri": one["source"]}),
                    profile=json.dumps({"sha256": one["digest"], "bytes": one.get("bytes", "")}),
                ),
                [InputTag("mlflow.data.context", one["context"])],
            )
            for one in datasets
        ]
        self.connect()[0].log_inputs(run_id, inputs)

    def _copy_artifact(self, run: _Run, line: dict[str, Any]) -> None:
        path = run.folder / line["path"]
        client = self.connect()[0]
        if not path.exists():
            logging.warning("%s is gone; its run goes on without it", path)
        elif path.is_dir():
            client.log_artifacts(run.run_id, str(path), f"{line['folder']}/{path.name}".lstrip("/"))
        else:
            client.log_artifact(run.run_id, str(path), line["folder"] or None)

    def _conclude_parents(self) -> bool:
        """Conclude the runs of `dvc` processes that have ended. Returns whether none is left open."""
        waiting = {_Run.load(folder).pipeline for folder in self.pending()}
        none_open = True
        for parent in self.parents():
            if parent.left.exists() and parent.run_id and parent.folder.name not in waiting:
                self._conclude(parent)
            else:
                none_open = False
        return none_open

    def _children(self, run_id: str) -> list[Child]:
        """The runs of the stages of a `dvc` process, in their order."""
        client, experiment = self.connect()
        found = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", order_by=["attributes.start_time"]
        )
        return [
            Child(
                run.data.tags.get("stage", ""),
                run.info.run_id,
                run.info.status,
                self.folder / "done" / run.data.tags.get("journal", ""),
            )
            for run in found
        ]

    def _made_by(self, key: str) -> str:
        """The newest run that made what an entry of dvc.lock says."""
        return self._find("lock_entry", key, " and attributes.status = 'FINISHED'")

    def _conclude(self, parent: _Parent) -> None:
        """Tell in MLflow what a `dvc` process left, and log its model."""
        client = self.connect()[0]
        children = self._children(parent.run_id)
        place, cache = Folder(parent.left), Cache(self.root)
        try:
            ending = conclude(place, cache, Folder(parent.folder).read(LOCK), children, self._made_by)
        except (UserError, KeyError, TypeError, ValueError) as error:  # files that DVC did not write so
            logging.exception("what the pipeline left can't be read")
            ending = Ending("FAILED", tags={"not_concluded": str(error)})
        for run_id, key in ending.keys.items():
            client.set_tag(run_id, "lock_entry", key)
        client.log_artifacts(parent.run_id, str(parent.left))
        if (diff := parent.left / DIFF).exists():  # again by itself: `log_artifacts` drops the mode of files
            client.log_artifact(parent.run_id, str(diff))
        self._log_params(parent.run_id, ending.params)
        told = [(parent.time_ms, step, values) for step, values in ending.metrics]
        self._log_metrics(parent.run_id, told)
        self._log_tags(parent.run_id, ending.tags)
        self._log_inputs(parent.run_id, ending.datasets)
        self._log_model(parent, ending, place, cache)
        # Where all that it began went on under a later `dvc repro`, this one was interrupted.
        interrupted = not children and not parent.folder.name.startswith("none-")
        client.set_terminated(parent.run_id, "KILLED" if interrupted else ending.status, now_ms())
        shutil.rmtree(parent.folder)
        write_text(self.folder / _TOLD, ending.tags.get("lock_sha256", ""))

    def _place(self, parent: _Parent) -> Place:
        """The work tree of a `dvc` process; of a scratch folder that is gone, the commit that DVC keeps."""
        workspace = Path(parent.workspace)
        if not workspace.exists() and (commit := experiment_commit(self.root, parent.experiment)):
            return Commit(self.root, commit)
        return Folder(workspace)

    def _log_model(self, parent: _Parent, ending: Ending, place: Place, cache: Cache) -> None:
        """Register the model of a whole chain, and write the page of the run; a refusal stops nothing."""
        lines = {"command": self._tag(parent.run_id, "command"), "data": ending.tags.get("data_sha256", "")}
        if "weights_sha256" in ending.tags and parent.model_tries < _MODEL_TRIES:
            from compactgpt import registry

            parent.model_tries += 1
            parent.save()
            made_by = {stage: run_id for stage, _, run_id in ending.fates}
            client, experiment = self.connect()
            try:
                shelf = registry.Shelf(
                    client, experiment, made_by.get("training") or parent.run_id, parent.run_id
                )
                version = shelf.register(ending, place, cache)
            except Exception as error:
                logging.exception("the model is not logged")
                if parent.model_tries < _MODEL_TRIES:
                    raise
                lines["model"] = f"not logged: {type(error).__name__}"
            else:
                self._log_tags(parent.run_id, {"model_version": version})
                lines["model"] = (
                    f"[{registry.NAME} version {version}](#/models/{registry.NAME}/versions/{version})"
                )
        text = note(ending, lambda run_id: f"#/experiments/{self._experiment}/runs/{run_id}", lines)
        self._log_tags(parent.run_id, {"mlflow.note.content": text})

    def _tag(self, run_id: str, name: str) -> str:
        return str(self.connect()[0].get_run(run_id).data.tags.get(name, ""))

    def record_unrun(self) -> None:
        """Tell of a `dvc repro` that found nothing to run, once a dvc.lock: no stage did."""
        lock, told = Folder(self.root).read(LOCK) or b"", self.folder / _TOLD
        key = hashlib.sha256(lock).hexdigest()
        if (told.exists() and told.read_text() == key) or not read_chain(Folder(self.root)).complete:
            return
        if self._find("lock_sha256", key):
            write_text(told, key)
            return
        facts = {"host": platform.node(), "workspace": str(self.root), "pipeline": f"none-{now_ms()}"}
        tags = {**git_facts(self.root), **machine_facts(), **facts, "stage": "pipeline"}
        folder = self.folder / "pipelines" / facts["pipeline"]
        folder.mkdir(parents=True)
        (folder / LOCK).write_bytes(lock)
        if tags.get("git.dirty") == "true":
            write_private(folder / DIFF, uncommitted(self.root))
        begun = now_ms()
        _Parent(folder, self._create(_pipeline_name(begun), begun, tags), begun, str(self.root)).save()
        self.sync()


def _pipeline_name(time_ms: int) -> str:
    """What tells pipelines apart in a legend."""
    return time.strftime("pipeline %m-%d %H:%M:%S", time.localtime(time_ms / 1000))


def gpu_monitor() -> Any:
    """MLflow's look at Nvidia's GPUs, where nvidia-ml-py is installed and there are some."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    with suppress(ImportError, RuntimeError):
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        return GPUMonitor()
    return None


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


def run_of_value(root: Path, value: dict[str, Any]) -> str:
    """Name the newest finished run of a value's stage that logged this very number, or say that none did."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        if not (root / "mlflow.db").exists():
            return "no MLflow store here: `make repro` keeps one"
        if not os.access(root, os.W_OK):
            return "not looked up: SQLite writes beside mlflow.db, and this folder is read-only"
    client, experiment = Syncer(root).connect()
    stage = value["stage"]
    wanted = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment], wanted, order_by=["attributes.start_time DESC"]):
        names = [name for name, number in run.data.metrics.items() if number == value["value"]]
        if names:
            return f"{run.info.run_id} ({stage}, metric {names[0]})"
    return f"no finished run of {stage} in the store logged this number"


def drain(root: Path, patience_seconds: float = 60.0, *, record_unrun: bool = False) -> bool:
    """Copy what is left of ended runs, waiting for a process that already does so.

    Args:
        root: the repository.
        patience_seconds: how long at most.
        record_unrun: give a dvc.lock that no run has told of a run of its own.

    Returns:
        Whether MLflow has everything.

    Raises:
        OSError: nothing can be written in the repository.
        Unreachable: MLflow does not answer, or refuses.
    """
    syncer = Syncer(root)
    syncer.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_seconds
    try:
        while syncer.left() and time.monotonic() < deadline:
            with _lock(syncer.folder) as alone:
                if alone:
                    syncer.sync()
            time.sleep(0.2)
        if record_unrun and not syncer.left():
            with _lock(syncer.folder) as alone:
                if alone:
                    syncer.record_unrun()
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a server or a store may throw
        why = _IN_ADDRESS.sub(r"\1***@", str(error).partition("\n")[0])
        raise Unreachable(f"MLflow did not take it ({why}): nothing is lost, run this again") from error
    return not syncer.left()


class Discreet(logging.Formatter):
    """Leaves the user and password of an address out: MLflow's errors quote MLFLOW_TRACKING_URI."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record with its traceback."""
        return _IN_ADDRESS.sub(r"\1***@", super().format(record))


def main() -> None:
    """The process that a stage leaves running for a repository, which `--follow ROOT` names."""
    if sys.argv[1:-1] != ["--follow"]:
        sys.exit("`compactgpt sync` gives MLflow what it lacks")
    handler = logging.StreamHandler()
    handler.setFormatter(Discreet("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    follow(Path(sys.argv[-1]))


if __name__ == "__main__":
    main()
