"""A real MLflow server on this machine, killed and restarted midway: nothing is lost, nothing doubled."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from compactgpt.syncing import Syncer

from tests.store import journal

START_SECONDS = 120.0  # of a busy machine


class Server:
    """`mlflow server` on a free port of the loopback, with its store in a folder."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.words = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db",
            "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        self.log = open(folder / "server.log", "ab")  # noqa: SIM115
        self.process = None

    def start(self):
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            self.words, stdout=self.log, stderr=self.log, env=env, start_new_session=True
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path, empty_store, monkeypatch):
    (tmp_path / "server.db").write_bytes(empty_store)
    server = Server(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()
    server.log.close()


@pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="starts a server twice: `make test-server`")
def test_a_server_that_is_killed_and_restarted_loses_and_doubles_nothing(server, tmp_path):
    run = journal(tmp_path)
    run.params({"model": {"n_layer": 2}})
    for step in (1, 2):
        run.metrics({"train/loss": 4.0 - step}, step)
    assert not Syncer(tmp_path).sync()
    run.metrics({"train/loss": 1.0}, 3)
    (tmp_path / "report.json").write_text("{}")
    run.artifact(tmp_path / "report.json", "reports")
    server.kill()
    late = journal(tmp_path, "evaluation")  # begins while nobody listens
    late.metrics({"eval/loss": 2.0})
    late.end("FINISHED")
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)connection|retries"):
            Syncer(tmp_path).sync()
    server.start()
    syncer = Syncer(tmp_path)
    assert not syncer.sync()  # all is told, but training still runs
    state = next(tmp_path.glob(".state/tracking/*-training-*/synced.json"))
    state.unlink()  # as if the answer to the last request had been lost with the server
    run.end("FINISHED")
    assert syncer.sync()
    client, experiment = Syncer(tmp_path).connect()
    found = {one.info.run_name: one for one in client.search_runs([experiment])}
    assert sorted(found) == ["evaluation", "training"]
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    training = found["training"].info.run_id
    history = [(one.step, one.value) for one in client.get_metric_history(training, "train/loss")]
    assert history == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found["training"].data.params == {"model.n_layer": "2"}
    assert [one.path for one in client.list_artifacts(training, "reports")] == ["reports/report.json"]
    assert found["evaluation"].data.metrics == {"eval/loss": 2.0}


@pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="starts a server: `make test-server`")
def test_a_store_that_a_server_has_open_is_written_beside_it_and_both_see_all(
    tmp_path, empty_store, monkeypatch
):
    """As `make ui` does while a training runs: readers by the server, the writer on the file."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    (tmp_path / "server.db").symlink_to(tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = Server(tmp_path)
    server.start()
    try:
        run, syncer = journal(tmp_path), Syncer(tmp_path)
        seen = []
        for step in range(1, 6):
            run.metrics({"train/loss": 4.0 - step / 2}, step)
            assert not syncer.sync()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            client, experiment = Syncer(tmp_path).connect()
            (found,) = client.search_runs([experiment])
            seen.append(len(client.get_metric_history(found.info.run_id, "train/loss")))
            client.set_tag(found.info.run_id, f"looked.{step}", "yes")  # the page writes too
            monkeypatch.delenv("MLFLOW_TRACKING_URI")
            syncer._client = None  # the address is one of the process
        run.end("FINISHED")
        assert syncer.sync()
        assert seen == [1, 2, 3, 4, 5]
        (found,) = Syncer(tmp_path).connect()[0].search_runs([experiment])
        assert found.info.status == "FINISHED"
        assert {f"looked.{step}" for step in range(1, 6)} <= set(found.data.tags)
    finally:
        server.kill()
        server.log.close()
