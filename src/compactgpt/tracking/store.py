"""Open a tracking store of MLflow, write to its runs, and turn its errors into one-sentence messages."""

import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

ARTIFACTS = "mlartifacts"  # the folder for artifacts if the tracking store is mlflow.db
SAMPLE_SECONDS = 5.0  # between two samples of the system metrics
_SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # No retries by MLflow, because a retry would repeat a request that the server executed without an answer.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# The charts at the address `?viewStateShareKey=pipelines`: only runs of pipelines, the loss curves first.
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
        for key in ("train/loss", "val/loss")
    ],
}  # fmt: skip
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "A run is one `dvc repro` or `dvc exp run`; its child runs are its stages. "
    "For charts of pipelines, add `?viewStateShareKey=pipelines` to the address of this experiment.",
    "mlflow.sharedViewState.pipelines": json.dumps(_VIEW),
}


@dataclass(frozen=True)
class Store:
    """An open tracking store of MLflow, with one experiment."""

    client: Any  # an mlflow.MlflowClient
    experiment: str  # the experiment's id
    identity: str  # a text that changes if the store is deleted and created again

    def find(self, tag: str, value: str) -> str:
        """Return the id of the newest run whose tag has this value, or an empty string if there is no run."""
        wanted, newest = f"tags.`{tag}` = '{value}'", ["attributes.start_time DESC"]
        found = self.client.search_runs([self.experiment], wanted, max_results=1, order_by=newest)
        return str(found[0].info.run_id) if found else ""

    def create(self, tag: str, value: str, name: str, time_ms: int, tags: Mapping[str, str]) -> str:
        """Return the id of the run whose tag has this value. Create the run if it does not exist.

        `time_ms` is the start of a new run in milliseconds since 1970; `tags` are further tags.
        """
        from mlflow.tracking.context.registry import resolve_tags

        if run_id := self.find(tag, value):
            return run_id
        tags = resolve_tags({**tags, tag: value, "mlflow.runName": name})  # MLflow adds user and commit
        # The client creates the run, because `mlflow.start_run` accepts no start time.
        return str(self.client.create_run(self.experiment, time_ms, tags, name).info.run_id)

    def log(self, run_id: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the parameters, metrics, tags and data sets in the lines of a journal to a run."""
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
        """Log the files of a folder to a run. `target` is the artifact folder in MLflow."""
        self.client.log_artifacts(run_id, str(folder), target)
        if (folder / DIFF).exists():
            # `log_artifacts` makes the file readable for all users. `log_artifact` keeps the file private.
            self.client.log_artifact(run_id, str(folder / DIFF), target)

    def start_monitor(self, run_id: str) -> Any:
        """Start to log the system metrics of this machine to a run. Return MLflow's monitor."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        uri = self.client.tracking_uri
        monitor = SystemMetricsMonitor(run_id, SAMPLE_SECONDS, resume_logging=True, tracking_uri=uri)
        monitor.start()
        return monitor


def open_store(root: Path, wanted: Mapping[str, str] | None = None) -> Store:
    """Open a tracking store. Create the SQLite database and the experiment if they are missing.

    `root` is the repository. `wanted` names the store in the form that `tracking_store` returns; without
    `wanted`, environment variables name the store. Raises BadData if the SQLite database is damaged, and
    Unreachable if the server fails or does not answer.
    """
    wanted = wanted or tracking_store()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # else MLflow would log every run to this run
    for name in ("alembic", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = wanted["uri"]
    if without_password(os.environ.get("MLFLOW_TRACKING_URI", "")) == uri:  # a journal has no password
        uri = os.environ["MLFLOW_TRACKING_URI"]
    database = root.resolve() / uri.removeprefix(_SQLITE) if uri.startswith(_SQLITE) else None
    uri = f"{_SQLITE}{database}" if database else uri
    tracking_folder(root).mkdir(parents=True, exist_ok=True)
    with store_errors(wanted["uri"]), open(tracking_folder(root) / "store.lock", "w") as lock:
        import mlflow

        fcntl.flock(lock, fcntl.LOCK_EX)  # so that two processes do not create one database
        environment = dict(os.environ)
        try:
            if database:
                _check_database(database)
            mlflow.set_tracking_uri(uri)
            experiment = _set_experiment(wanted, database)
        finally:  # MLflow sets environment variables, which a journal would take for the user's settings
            os.environ.clear()
            os.environ.update(environment)
    identity = f"{experiment.experiment_id}@{experiment.creation_time}"
    return Store(mlflow.MlflowClient(uri, uri), experiment.experiment_id, identity)


def _check_database(path: Path) -> None:
    """Raise sqlite3.DatabaseError if a database is damaged. If the file is missing, create the database."""
    is_new = not path.exists()
    with closing(sqlite3.connect(path)) as database:
        if is_new:
            database.execute("pragma journal_mode=wal")  # so that a reader never waits for a writer
        (found,) = database.execute("pragma quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(" ".join(found.split()))


def _set_experiment(wanted: Mapping[str, str], database: Path | None) -> Any:
    """Return the experiment that `wanted` names, and make it MLflow's active experiment.

    Create the experiment if the store has none with this name.
    """
    import mlflow

    client, name = mlflow.MlflowClient(), wanted["experiment"]
    if name and not client.get_experiment_by_name(name):
        artifacts = str(database.parent / ARTIFACTS) if database else None
        client.create_experiment(name, artifacts, EXPERIMENT_TAGS)
        if database:
            # MLflow saves an absolute path: a copied repository would write its artifacts into the original.
            with closing(sqlite3.connect(database, timeout=20)) as store, store:
                store.execute(
                    "update experiments set artifact_location = ? where name = ?", [ARTIFACTS, name]
                )
    return mlflow.set_experiment(name or None, wanted["experiment_id"] or None)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn an error of the server, MLflow or SQLAlchemy into a UserError with the store's address.

    An error of the local disk, such as a full disk, stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, such as no space left
            raise
        first: BaseException = error
        while first.__context__:  # MLflow and its libraries wrap the first error several times
            first = first.__context__
        found = (first.strerror or first) if isinstance(first, OSError) else error
        reason = without_password(str(found).strip().partition("\n")[0][:300]) or type(error).__name__
        if type(first) is sqlite3.DatabaseError:  # a subclass, such as OperationalError, means no damage
            name = uri.removeprefix(_SQLITE)
            raise BadData(
                f"{name} is damaged ({reason}): move it away (`mv {name} {name}.old`); "
                "`compactgpt sync` copies the runs again from .state/tracking"
            ) from error
        raise Unreachable(
            f"MLflow at {uri} failed ({reason}): no run is lost; when MLflow answers, `compactgpt sync` "
            "copies the runs from .state/tracking"
        ) from error


def run_of_value(root: Path, stage: str) -> str:
    """Return the id of the run that made the outputs of a stage in dvc.lock.

    Return a sentence with the reason if no run is known.
    """
    if tracking_store()["uri"] == DEFAULT_URI and not (root / "mlflow.db").exists():
        return "no MLflow store here: `make repro` creates mlflow.db"
    if tracking_store()["uri"] == DEFAULT_URI and not os.access(root, os.W_OK):
        return "not looked up: SQLite must write next to mlflow.db, but this folder is read-only"
    entry, store = read_chain(Folder(root)).entries.get(stage), open_store(root)
    with store_errors(tracking_store()["uri"]):
        run_id = store.find("lock_entry", entry_key(entry)) if entry else ""
    return f"{run_id} ({stage})" if run_id else f"no run in MLflow made the outputs of {stage} in dvc.lock"
