"""A real MLflow server that is killed and restarted, and a real queue of DVC: no run is lost or doubled."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from compactgpt.common.errors import Unreachable
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import run_folders
from compactgpt.tracking.store import open_store
from tests.support import tracking_store
from tests.support.dvc_projects import dvc
from tests.support.tracking_store import copy, enter_project, history, journal, runs, stage_statuses

START_SECONDS = 300.0  # of a busy machine
STAGES = "{training: {cmd: x}, evaluation: {cmd: x}}"

pytestmark = pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="takes minutes: `make test-server`")


class Server:
    """`mlflow server` on the project's database and a free port of the loopback, as `make ui` starts it."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.root, port = root, self.uri.rpartition(":")[2]
        self.words = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{root}/mlflow.db",
            "--artifacts-destination", str(root / "mlartifacts"), "--workers", "1",
            "--host", "127.0.0.1", "--port", port,
        ]  # fmt: skip

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.root / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                self.words, stdout=log, stderr=log, env=env, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    return enter_project(tmp_path, empty_store, monkeypatch, STAGES)


@pytest.fixture
def server(root):
    server = Server(root)
    server.start()
    yield server
    server.kill()


def test_a_server_that_is_killed_and_restarted_loses_and_doubles_nothing(server, root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = journal(root)
    run.params({"model": {"n_layer": 2}})
    run.metrics({"train/loss": 3.0}, 1)
    assert not copy(root)
    run.metrics({"train/loss": 1.0}, 2)
    (root / "report.json").write_text("{}")
    run.artifact(root / "report.json", "reports")
    server.kill()
    late = journal(root, "evaluation")  # begins while no server listens
    late.metrics({"eval/loss": 2.0})
    late.end("FINISHED")
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=f"{server.uri} failed"):
        sync(root)
    assert time.monotonic() - begin < 15
    server.start()
    assert not copy(root)  # training still runs
    run.end("FINISHED")
    sync(root)
    (training,), (evaluation,) = runs(root, "training"), runs(root, "evaluation")
    assert {training.info.status, evaluation.info.status} == {"FINISHED"}
    assert history(root, training, "train/loss") == [(1, 3.0), (2, 1.0)]
    assert training.data.params == {"model.n_layer": "2"}
    files = open_store(root).client.list_artifacts(training.info.run_id, "reports")
    assert [file.path for file in files] == ["reports/report.json"]
    assert evaluation.data.metrics == {"eval/loss": 2.0}


SCRIPT = """
import json, os, sys
from pathlib import Path
from ruamel.yaml import YAML
from compactgpt.tracking.journal import Journal, process_facts, state_folder
from compactgpt.tracking.mlflow_logger import start_logger
name = sys.argv[1]
tags = {"dvc.experiment": os.environ["DVC_EXP_NAME"], "dvc.baseline": os.environ["DVC_EXP_BASELINE_REV"]}
run = Journal(state_folder(), name, {"tags": tags, "workspace": os.getcwd(), **process_facts()})
run.keep_before(Path.cwd())
start_logger(run.run_folder)
loss = 1.0 / YAML(typ="safe").load(Path("params.yaml"))["training"]["steps"]
Path("reports").mkdir(exist_ok=True)
Path(f"reports/{name}.json").write_text(json.dumps({"loss": {"value": loss}}))
run.metrics({f"{name}/loss": loss}, 1)
run.artifact(Path(f"reports/{name}.json"), "reports")
run.end("FINISHED")
"""
CHAIN = f"""
stages:
  training:
    cmd: {sys.executable} stage.py training
    deps: [stage.py]
    params: [training]
    outs: [reports/training.json: {{cache: false}}]
  evaluation:
    cmd: {sys.executable} stage.py evaluation
    deps: [stage.py, reports/training.json]
    outs: [reports/evaluation.json: {{cache: false}}]
"""


def test_every_experiment_has_a_complete_pipeline_run(tmp_path, empty_store, monkeypatch):
    root = enter_project(tmp_path, empty_store, monkeypatch)
    (root / "stage.py").write_text(SCRIPT)
    (root / "dvc.yaml").write_text(CHAIN)
    (root / "params.yaml").write_text("training:\n  steps: 1\n")
    (root / ".gitignore").write_text("/.state/\nmlflow.db*\n/mlartifacts/\n")
    tracking_store.git(root, "init", "-q")
    dvc(root, "init", "-q")
    tracking_store.git(root, "add", ".")
    tracking_store.git(root, "commit", "-qm", "x")
    for steps in (2, 3):
        dvc(root, "exp", "run", "-q", "--queue", "-n", f"queued-{steps}", "-S", f"training.steps={steps}")
    dvc(root, "queue", "start", "-j", "2")
    deadline = time.monotonic() + 150
    while len([one for one in run_folders(root) if not one.alive and len(one.stages()) == 2]) < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    dvc(root, "exp", "run", "-q", "--temp", "-n", "temporary", "-S", "training.steps=5")
    dvc(root, "exp", "run", "-q", "-n", "here", "-S", "training.steps=6")
    sync(root)
    found = {run.info.run_name: run for run in runs(root, "pipeline")}
    assert found.keys() == {"queued-2", "queued-3", "temporary", "here"}
    refs = tracking_store.git(root, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    for (name, run), steps in zip(sorted(found.items()), (6, 2, 3, 5), strict=True):
        assert run.info.status == "FINISHED", run.data.tags["mlflow.note.content"]
        assert run.data.params == {"training.steps": str(steps)}
        assert run.data.metrics == {"evaluation/loss": 1.0 / steps, "training/loss": 1.0 / steps}
        assert {what for what, _ in stage_statuses(run).values()} == {"ran (finished)"}
        commit = next(ref for ref in refs if ref.endswith(f"/{name}"))
        lock = tracking_store.git(root, "show", f"{commit}:dvc.lock") + "\n"
        assert run.data.tags["lock_sha256"] == tracking_store.sha256(lock.encode())
    dvc(root, "exp", "apply", "-q", "queued-3")
    sync(root)  # its dvc.lock has a run
    assert len(runs(root, "pipeline")) == 4
