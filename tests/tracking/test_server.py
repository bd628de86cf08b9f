"""A real MLflow server on this machine, killed and restarted midway: nothing is lost, nothing doubled."""

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
from compactgpt.tracking.store import open_store
from tests.support.tracking_store import copy, enter_project, history, journal, runs

START_SECONDS = 300.0  # of a busy machine
STAGES = "{training: {cmd: x}, evaluation: {cmd: x}}"

pytestmark = pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="starts servers: `make test-server`")


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


def test_a_store_that_the_ui_has_open_is_written_next_to_it_and_both_see_all(server, root, monkeypatch):
    run = journal(root)
    run.metrics({"train/loss": 3.0}, 1)
    assert not copy(root)
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", server.uri)
        (found,) = runs(root)
        assert history(root, found, "train/loss") == [(1, 3.0)]
        open_store(root).client.set_tag(found.info.run_id, "looked", "yes")  # the page writes, too
    (root / "report.json").write_text("{}")
    run.artifact(root / "report.json", "reports")
    run.end("FINISHED")
    sync(root)
    (found,) = runs(root)
    assert (found.info.status, found.data.tags["looked"]) == ("FINISHED", "yes")
    address = f"{server.uri}/get-artifact?path=reports/report.json&run_id={found.info.run_id}"
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert answer.read() == b"{}"
