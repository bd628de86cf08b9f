"""Open and check MLflow's tracking store, and turn its errors into one-sentence messages."""

import concurrent.futures as futures
import fcntl
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from compactgpt.common.errors import BadData, Unreachable, UserError
from compactgpt.common.git import DIFF
from compactgpt.tracking.dvc_files import Folder, entry_key, read_chain
from compactgpt.tracking.journal import (
    DEFAULT_URI,
    MAX_DIGEST,
    tracking_folder,
    tracking_store,
    without_password,
)

REQUEST_SECONDS = 5  # timeout of one HTTP request
OPEN_SECONDS = 12.0  # timeout for opening a store, on an MLflow server or a database server
ARTIFACTS = "mlartifacts"
_SQLITE = "sqlite:///"
# In the errors of MLflow (an older version), Alembic (a newer one) and SQLite (another program).
_OTHER_SCHEMA = ("out-of-date database schema", "Can't locate revision", "no such table", "no such column")
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # No automatic retries: the server may have executed a request without an answer. The logger first checks
    # what the store has, then tries again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_ABOUT = (
    "A run is one `dvc repro` or `dvc exp run`; its child runs are the stages that ran in it. "
    "The charts of pipelines: add `?viewStateShareKey=pipelines` to the address of this experiment."
)
_CURVES = ("train/loss", "val/loss")
# The view that `?viewStateShareKey=pipelines` opens: only pipelines, with the loss curves first. MLflow
# appends the other sections and charts.
_VIEW = {
    "searchFilter": "tags.stage = 'pipeline'",
    "compareRunsMode": "CHART",
    "isAccordionReordered": True,
    "compareRunSections": [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "isGenerated": True}
        for name in ("train", "val", "eval")
    ],
    "compareRunCharts": [
        {"type": "LINE", "uuid": key, "metricKey": key, "selectedMetricKeys": [key], "displayName": key,
         "metricSectionId": key.partition("/")[0], "isGenerated": True, "xAxisKey": "step",
         "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0, "range": {},
         "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True}
        for key in _CURVES
    ],
}  # fmt: skip
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": _ABOUT,
    "mlflow.sharedViewState.pipelines": json.dumps(_VIEW),
}


@dataclass(frozen=True)
class Store:
    """An open tracking store."""

    client: Any  # an mlflow.MlflowClient
    experiment: str  # the experiment's id
    identity: str  # changes if the store is deleted and created again

    def find(self, tag: str, value: str, further: str = "") -> str:
        """Return the id of the newest run whose tag has this value; an empty string if no run has it.

        `further` is appended to MLflow's search filter.
        """
        wanted, newest = f"tags.`{tag}` = '{value}'{further}", ["attributes.start_time DESC"]
        found = self.client.search_runs([self.experiment], wanted, max_results=1, order_by=newest)
        return str(found[0].info.run_id) if found else ""

    def create(self, tag: str, value: str, name: str, time_ms: int, tags: Mapping[str, str]) -> str:
        """Return the id of the run whose tag has this value. Create the run if it is missing.

        `mlflow.start_run` takes no start time, so this method creates the run with MLflow's client.
        """
        from mlflow.tracking.context.registry import resolve_tags

        if run_id := self.find(tag, value):
            return run_id
        tags = resolve_tags({**tags, tag: value, "mlflow.runName": name})  # user, source type, commit
        return str(self.client.create_run(self.experiment, time_ms, tags, name).info.run_id)

    def log(self, run_id: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the parameters, metrics, tags and data sets of journal lines to a run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        params, metrics, tags, inputs = [], [], [], []
        for line in lines:
            values = line.get("values", {}).items()
            if line["kind"] == "params":
                params += [Param(key, str(value)) for key, value in values]
            elif line["kind"] == "metrics":
                metrics += [Metric(key, value, line["time_ms"], line["step"]) for key, value in values]
            elif line["kind"] == "tags":
                tags += [RunTag(key, str(value)) for key, value in values]
            for one in line.get("datasets", []):
                source = json.dumps({"uri": one["source"]})
                profile = json.dumps({"sha256": one["digest"], "bytes": one.get("bytes", "")})
                dataset = Dataset(one["name"], one["digest"][:MAX_DIGEST], "local", source, profile=profile)
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", one["context"])]))
        self.client.log_batch(run_id, metrics, params, tags)
        if inputs:
            self.client.log_inputs(run_id, inputs)

    def log_folder(self, run_id: str, folder: Path, target: str | None = None) -> None:
        """Log the files of a folder to a run, under the artifact path `target`."""
        self.client.log_artifacts(run_id, str(folder), target)
        if (folder / DIFF).exists():  # again: `log_artifacts` drops file modes, `log_artifact` keeps them
            self.client.log_artifact(run_id, str(folder / DIFF), target)


def open_store(root: Path, wanted: Mapping[str, str] | None = None) -> Store:
    """Open a tracking store. Create the database and the experiment if they are missing.

    Args:
        root: the repository.
        wanted: the store, as `tracking_store` returns it; by default the store that the environment names.

    Raises:
        BadData: the SQLite database is damaged.
        Unreachable: the server does not answer or returns an error, or another process holds the lock.
    """
    wanted = wanted or tracking_store()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # MLflow would log all runs to this run
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = _address(root, wanted["uri"])
    tracking_folder(root).mkdir(parents=True, exist_ok=True)
    with store_errors(wanted["uri"]), open(tracking_folder(root) / "store.lock", "w") as lock:
        import mlflow  # takes seconds: imported before the timeout starts

        _wait_for(lock)  # two processes must not create one database
        environment = dict(os.environ)
        mlflow.set_tracking_uri(uri)
        try:
            if uri.startswith(_SQLITE):
                database = Path(uri.removeprefix(_SQLITE))
                _check_database(database)
                experiment = _set_experiment(wanted, str(database.parent / ARTIFACTS))
                if database.parent == root.resolve():
                    _keep_artifacts_here(database)
            else:
                experiment = _within(OPEN_SECONDS, lambda: _set_experiment(wanted, None))
        finally:  # MLflow's setters change environment variables, which journals read as the user's settings
            os.environ.clear()
            os.environ.update(environment)
    identity = f"{experiment.experiment_id}@{experiment.creation_time}"
    return Store(mlflow.MlflowClient(uri, uri), experiment.experiment_id, identity)


def saved_identity(root: Path, wanted: Mapping[str, str]) -> str:
    """Return the identity of a store in a SQLite file, read without MLflow; empty for any other store."""
    path = Path(_address(root, wanted["uri"]).removeprefix(_SQLITE))
    column = "experiment_id" if wanted["experiment_id"] else "name"
    query = f"select experiment_id || '@' || creation_time from experiments where {column} = ?"  # noqa: S608
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        found = database.execute(query, [wanted["experiment_id"] or wanted["experiment"]]).fetchone()
        return str(found[0]) if found else ""
    return ""


def _set_experiment(wanted: Mapping[str, str], artifacts: str | None) -> Any:
    """Set MLflow's active experiment and return it. If a named experiment is missing, create it."""
    import mlflow

    client, name = mlflow.MlflowClient(), wanted["experiment"]
    if name and not client.get_experiment_by_name(name):
        client.create_experiment(name, artifacts)
    experiment = mlflow.set_experiment(name or None, wanted["experiment_id"] or None)
    for key in EXPERIMENT_TAGS.keys() - experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, key, EXPERIMENT_TAGS[key])
    return experiment


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Call `work` in a thread and return its result.

    A database driver can wait for minutes in C code, where no signal interrupts it.

    Raises:
        TimeoutError: `work` takes longer than `seconds`. Its thread continues in the background.
    """
    future: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (the caller gets the error)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not futures.wait([future], seconds).done:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return future.result()


def _wait_for(lock: TextIO) -> None:
    """Lock a file. Raise TimeoutError if another process holds the lock for OPEN_SECONDS."""
    deadline = time.monotonic() + OPEN_SECONDS
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    raise TimeoutError(f"another process holds {lock.name}")


def _address(root: Path, uri: str) -> str:
    """Return the store's full address: with the environment's password, or with an absolute SQLite path.

    Journals have addresses without passwords.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if without_password(given) == uri:
        uri = given
    return f"{_SQLITE}{root.resolve() / uri.removeprefix(_SQLITE)}" if uri.startswith(_SQLITE) else uri


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn errors of the server, MLflow or SQLAlchemy into one sentence with the address and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # an error of the local disk
            raise
        first: BaseException = error
        while first.__context__:  # MLflow and its libraries wrap the first error several times
            first = first.__context__
        found = (first.strerror or first) if isinstance(first, OSError) else error
        reason = str(found).strip().partition("\n")[0][:300]
        uri = without_password(uri)
        name = uri.removeprefix(_SQLITE)
        move = f"`mv {name} {name}.old`; `compactgpt sync` copies the runs again from .state/tracking"
        if any(words in str(error) for words in _OTHER_SCHEMA):
            raise BadData(
                f"{name} has the tables of another version of MLflow ({without_password(reason)}): upgrade "
                f"an older one after a backup (`mlflow db upgrade {uri}`), move any other away ({move})"
            ) from error
        if type(first) is sqlite3.DatabaseError:  # subclasses, such as a locked database, mean no damage
            raise BadData(f"{name} is damaged ({reason}): move it away ({move})") from error
        raise Unreachable(
            f"MLflow at {uri} failed ({without_password(reason) or type(error).__name__}): "
            "no run is lost; when MLflow answers, `compactgpt sync` copies the runs from .state/tracking"
        ) from error


def _check_database(path: Path) -> None:
    """Raise sqlite3.DatabaseError if a database is damaged. Create an empty database if it is missing."""
    is_new = not path.exists()
    with closing(sqlite3.connect(path)) as database:
        if is_new:
            database.execute("pragma journal_mode=wal")  # readers and the writer do not wait for each other
        (found,) = database.execute("pragma quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))


def _keep_artifacts_here(database: Path) -> None:
    """Make artifact paths relative to the repository.

    MLflow makes the paths absolute, so a copy of the repository would write into the original repository. An
    experiment that was created in `make ui` has a path `mlflow-artifacts:`, which works only with a server.
    """
    columns = {
        "experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location",
    }  # fmt: skip
    with closing(sqlite3.connect(database, timeout=20)) as store, store:
        for table, column in columns.items():
            place = f"instr({column} || '/', '/{ARTIFACTS}/')"
            for value, condition in [
                (f"substr({column}, {place} + 1)", f"substr({column}, 1, 1) in ('/', 'f') and {place} > 0"),
                (f"'{ARTIFACTS}' || substr({column}, 18)", f"{column} like 'mlflow-artifacts:/%'"),
            ]:
                store.execute(f"update {table} set {column} = {value} where {condition}")  # noqa: S608


def run_of_value(root: Path, stage: str) -> str:
    """Return the id of the run that wrote a stage's entry in dvc.lock, or a sentence why no id is known."""
    if tracking_store()["uri"] == DEFAULT_URI and not (root / "mlflow.db").exists():
        return "no MLflow store here: `make repro` keeps one"
    if tracking_store()["uri"] == DEFAULT_URI and not os.access(root, os.W_OK):
        return "not looked up: SQLite writes next to mlflow.db, and this folder is read-only"
    entry, store = read_chain(Folder(root)).entries.get(stage), open_store(root)
    with store_errors(tracking_store()["uri"]):
        run_id = store.find("lock_entry", entry_key(entry)) if entry else ""
    return f"{run_id} ({stage})" if run_id else f"no run in the store made what dvc.lock has of {stage}"
