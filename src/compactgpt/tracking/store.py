"""Open an MLflow store, find and write MLflow runs, and shorten the error messages of MLflow."""

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

from compactgpt.common.errors import Unreachable, UserError
from compactgpt.tracking.dvc_files import Folder, entry_key, read_entries
from compactgpt.tracking.journal import (
    DEFAULT_URI,
    MAX_DIGEST,
    tracking_folder,
    tracking_store,
    without_password,
)

ARTIFACTS = "mlartifacts"  # the folder for artifacts if the tracking store is mlflow.db
SAMPLE_SECONDS = 5.0  # time between two samples of the system metrics
_SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow must not retry: the server may have executed a request whose answer was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# A page in MLflow with charts that compare the runs of pipelines; the loss curves come first.
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
    # Id and creation time of the experiment: they differ if the store was deleted and created again.
    identity: str

    def find(self, tag: str, value: str) -> str:
        """Return the id of the newest MLflow run whose `tag` is `value`; empty if no run has this value."""
        wanted, newest = f"tags.`{tag}` = '{value}'", ["attributes.start_time DESC"]
        found = self.client.search_runs([self.experiment], wanted, max_results=1, order_by=newest)
        return str(found[0].info.run_id) if found else ""

    def create(self, tag: str, value: str, name: str, time_ms: int, tags: Mapping[str, str]) -> str:
        """Return the id of the MLflow run whose `tag` is `value`. If no run has it, create one.

        The new run has `name`, `tags` and the start time `time_ms`, in milliseconds since 1970.
        """
        from mlflow.tracking.context.registry import resolve_tags

        if run_id := self.find(tag, value):
            return run_id
        tags = resolve_tags({**tags, tag: value, "mlflow.runName": name})  # MLflow adds user and commit tags
        # The client creates the run, because `mlflow.start_run` accepts no start time.
        return str(self.client.create_run(self.experiment, time_ms, tags, name).info.run_id)

    def log(self, run_id: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log lines of a journal, except artifacts, to the MLflow run `run_id`."""
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
        """Log the files of `folder` to an MLflow run, in its artifact folder `target` or at the top."""
        self.client.log_artifacts(run_id, str(folder), target)

    def start_monitor(self, run_id: str) -> Any:
        """Start to log this machine's system metrics to an MLflow run, and return the monitor."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        uri = self.client.tracking_uri
        monitor = SystemMetricsMonitor(run_id, SAMPLE_SECONDS, resume_logging=True, tracking_uri=uri)
        monitor.start()
        return monitor


def open_store(root: Path, wanted: Mapping[str, str] | None = None) -> Store:
    """Open an MLflow store, and create its SQLite database or its experiment if they are missing.

    `wanted` is a result of `tracking_store` (default: a new call). Raises Unreachable if MLflow fails.
    """
    wanted = wanted or tracking_store()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Hide warnings about system metrics, because they contain the server's password.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    uri, in_environment = wanted["uri"], os.environ.get("MLFLOW_TRACKING_URI", "")
    if without_password(in_environment) == uri:  # connect with the password, which `uri` lacks
        uri = in_environment
    tracking_folder(root).mkdir(parents=True, exist_ok=True)
    with store_errors(wanted["uri"]), open(tracking_folder(root) / "store.lock", "w") as lock:
        import mlflow

        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes must not create the same database
        artifacts = None  # None: an MLflow server chooses the folder for artifacts
        if uri.startswith(_SQLITE):
            database = root.resolve() / uri.removeprefix(_SQLITE)
            uri, artifacts = f"{_SQLITE}{database}", str(database.parent / ARTIFACTS)
            if not database.exists():
                with closing(sqlite3.connect(database)) as created:
                    created.execute("pragma journal_mode=wal")  # readers never wait for a writer
        client, name = mlflow.MlflowClient(uri, uri), wanted["experiment"]
        if name and not client.get_experiment_by_name(name):
            client.create_experiment(name, artifacts, EXPERIMENT_TAGS)
            if artifacts:
                # Make the stored path of the artifacts relative: each copy of the repository has its own.
                with closing(sqlite3.connect(database, timeout=20)) as opened, opened:
                    opened.execute(
                        "update experiments set artifact_location = ? where name = ?", [ARTIFACTS, name]
                    )
        environment = dict(os.environ)
        try:
            mlflow.set_tracking_uri(uri)
            experiment = mlflow.set_experiment(name or None, wanted["experiment_id"] or None)
        finally:
            # Undo MLflow's changes of the environment: `tracking_store` must see only the user's variables.
            os.environ.clear()
            os.environ.update(environment)
    identity = f"{experiment.experiment_id}@{experiment.creation_time}"
    return Store(client, experiment.experiment_id, identity)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's errors in a `with` block into Unreachable, whose message has the store's address `uri`.

    A UserError, or an error of the disk, is raised unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, such as no space left
            raise
        first: BaseException = error
        while first.__context__:  # find the first error: MLflow and its libraries wrap it several times
            first = first.__context__
        found = (first.strerror or first) if isinstance(first, OSError) else error
        reason = without_password(str(found).strip().partition("\n")[0][:300]) or type(error).__name__
        raise Unreachable(
            f"MLflow at {uri} failed ({reason}): no run is lost. When MLflow works again, or when you have "
            "moved a damaged mlflow.db away, `compactgpt sync` copies the runs from .state/tracking"
        ) from error


def run_of_value(root: Path, stage: str) -> str:
    """Return `ID (STAGE)` of the MLflow run that made the outputs that dvc.lock lists for `stage`.

    If there is no such run, return a sentence that says why.
    """
    if tracking_store()["uri"] == DEFAULT_URI and not (root / "mlflow.db").exists():
        return "no MLflow store here: `make repro` creates mlflow.db"
    entry, store = read_entries(Folder(root)).get(stage), open_store(root)
    with store_errors(tracking_store()["uri"]):
        run_id = store.find("lock_entry", entry_key(entry)) if entry else ""
    missing = f"MLflow has no run that made the outputs that dvc.lock lists for {stage}"
    return f"{run_id} ({stage})" if run_id else missing
