"""The tracking store of MLflow: opened, checked, and every failure of it in one sentence."""

import fcntl
import json
import logging
import os
import re
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compactgpt.common.errors import BadData, Unreachable, UserError
from compactgpt.tracking.journal import tracking_folder, tracking_store, without_password

TIMEOUT_SECONDS = 5
ARTIFACTS = "mlartifacts"
_SQLITE = "sqlite:///"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A request that was taken but not answered is not sent again unseen: the logger looks first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_SECONDS),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_ABOUT = (
    "A run is one `dvc repro` or `dvc exp run`; its child runs are the stages that ran in it. "
    "The charts of pipelines: add `?viewStateShareKey=pipelines` to the address of this experiment."
)
# What the address with `viewStateShareKey=pipelines` opens: pipelines only, the loss curves first.
_GROUPS = ("train", "val", "eval")  # MLflow appends the others
_CURVES = ("train/loss", "val/loss")
_VIEW = {
    "searchFilter": "tags.stage = 'pipeline'",
    "compareRunsMode": "CHART",
    "isAccordionReordered": True,
    "compareRunSections": [
        {
            "uuid": group, "name": group, "display": True, "isReordered": True, "deleted": False,
            "isGenerated": True,
        }
        for group in _GROUPS
    ],
    "compareRunCharts": [
        {
            "type": "LINE", "uuid": key, "metricKey": key, "selectedMetricKeys": [key],
            "metricSectionId": key.partition("/")[0], "displayName": key, "isGenerated": True,
            "deleted": False, "xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear",
            "lineSmoothness": 0,
            "range": {}, "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True,
        }
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

    client: Any  # MLflow's
    experiment: str  # id
    identity: str  # another one once the store was deleted and made again

    def find(self, tag: str, value: str, further: str = "") -> str:
        """Return the id of the newest run with a tag, or nothing."""
        wanted, newest = f"tags.`{tag}` = '{value}'{further}", ["attributes.start_time DESC"]
        found = (
            self.client.search_runs([self.experiment], wanted, max_results=1, order_by=newest)
            if value
            else ()
        )
        return str(found[0].info.run_id) if found else ""


def open_store(root: Path, wanted: Mapping[str, str] | None = None) -> Store:
    """Open a tracking store, creating database and experiment where they are missing.

    Args:
        root: the repository.
        wanted: as a journal's first line names it; the one of the environment by default.

    Raises:
        BadData: the database is damaged.
        Unreachable: the server does not answer, or refuses.
    """
    wanted = wanted or tracking_store()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("MLFLOW_RUN_ID", None)  # all runs would be logged to this one
    uri = _address(root, wanted["uri"])
    tracking_folder(root).mkdir(parents=True, exist_ok=True)
    lock_file = tracking_folder(root) / "store.lock"
    with store_errors(wanted["uri"]), _environment_kept(), open(lock_file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes must not create one database
        database = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
        if database:
            _check_database(database)
        elif uri.startswith("http"):
            _check_server(uri)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient()
        name = wanted["experiment"]
        if name and not client.get_experiment_by_name(name):
            client.create_experiment(name, str(database.parent / ARTIFACTS) if database else None)
        if database and database.parent == root.resolve():
            _keep_artifacts_here(database)
        experiment = mlflow.set_experiment(name or None, wanted["experiment_id"] or None)
        for key in EXPERIMENT_TAGS.keys() - experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, EXPERIMENT_TAGS[key])
        return Store(
            client, experiment.experiment_id, f"{experiment.experiment_id}@{experiment.creation_time}"
        )


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what MLflow's setters write to the environment: a journal would take it for the user's."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _address(root: Path, uri: str) -> str:
    """Return an address with its password, which no journal keeps, and a database's path in full."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if without_password(given) == uri:
        uri = given
    return f"{_SQLITE}{root.resolve() / uri.removeprefix(_SQLITE)}" if uri.startswith(_SQLITE) else uri


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever a server, MLflow or SQLAlchemy raises into one sentence with address and reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of this disk
            raise
        reason = str(getattr(error, "reason", "") or error).strip().partition("\n")[0][:300]
        why = without_password(reason) or type(error).__name__
        raise Unreachable(
            f"MLflow at {without_password(uri)} failed ({why}): no run is lost, `compactgpt sync` copies "
            "them from .state/tracking once it answers"
        ) from error


def _check_server(uri: str) -> None:
    """Raise an OSError without errno where no server answers within TIMEOUT_SECONDS."""
    parts = urlsplit(uri)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS):  # noqa: S310 (http)
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(getattr(reason, "strerror", None) or str(reason)) from error


def _check_database(path: Path) -> None:
    """Raise BadData where a SQLite file is damaged; create an empty one if it is missing."""
    if not path.exists():
        with closing(sqlite3.connect(path)) as made:
            made.execute("pragma journal_mode=wal")  # readers and the writer do not wait for each other
        return
    try:
        with closing(sqlite3.connect(path)) as database:
            (found,) = database.execute("pragma quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if re.search("locked|readonly|unable to open", str(error)):
            return  # no damage
        found = str(error)
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise BadData(
            f"{path.name} is damaged ({' '.join(str(found).split())[:200]}): move it away "
            f"(`mv {path.name} {path.name}.damaged`), then `compactgpt sync` copies the runs again from the "
            "journals in .state/tracking"
        )


def _keep_artifacts_here(database: Path) -> None:
    """Make artifact paths relative to the repository.

    MLflow makes them absolute, so a copy of the repository would write into the original; and an experiment
    that was created through `make ui` has `mlflow-artifacts:`, which only clients of a server can write.
    """
    columns = {
        "experiments": "artifact_location",
        "runs": "artifact_uri",
        "logged_models": "artifact_location",
    }
    with closing(sqlite3.connect(database, timeout=20)) as store, store:
        for table, column in columns.items():
            place = f"instr({column} || '/', '/{ARTIFACTS}/')"
            for value, condition in [
                (f"substr({column}, {place} + 1)", f"substr({column}, 1, 1) in ('/', 'f') and {place} > 0"),
                (f"'{ARTIFACTS}' || substr({column}, 18)", f"{column} like 'mlflow-artifacts:/%'"),
            ]:
                store.execute(f"update {table} set {column} = {value} where {condition}")  # noqa: S608
