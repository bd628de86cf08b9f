"""A real MLflow server on this machine, killed and restarted midway: nothing is lost, nothing doubled."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from compactgpt.common.errors import Unreachable
from compactgpt.model.weights import save_model
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.registry import promote
from compactgpt.tracking.store import open_store
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt
from tests.support.tracking_store import copy, journal, runs
from tests.support.trained_project import register, weights

START_SECONDS = 300.0  # of a busy machine


pytestmark = pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="starts servers: `make test-server`")


def wait_for(address, process):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


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
        wait_for(f"{self.uri}/health", self.process)

    def kill(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    """A project, and the database of a server in it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server.db").write_bytes(empty_store)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    return tmp_path


@pytest.fixture
def server(root, monkeypatch):
    server = Server(root)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()
    server.log.close()


def test_a_server_that_is_killed_and_restarted_loses_and_doubles_nothing(server, root):
    run = journal(root)
    run.params({"model": {"n_layer": 2}})
    for step in (1, 2):
        run.metrics({"train/loss": 4.0 - step}, step)
    assert not copy(root)
    run.metrics({"train/loss": 1.0}, 3)
    (root / "report.json").write_text("{}")
    run.artifact(root / "report.json", "reports")
    server.kill()
    late = journal(root, "evaluation")  # begins while no server listens
    late.metrics({"eval/loss": 2.0})
    late.end("FINISHED")
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=f"{server.uri} failed .Connection refused"):
        sync(root)
    assert time.monotonic() - begin < 15
    server.start()
    assert not copy(root)  # all is copied, but training still runs
    state = next(root.glob(".state/tracking/*/*-training-*/mlflow.json"))
    state.unlink()  # as if the answer to the last request had been lost with the server
    run.end("FINISHED")
    sync(root)
    opened = open_store(root)
    found = {one.info.run_name: one for one in runs(root)}
    assert sorted(found) == ["evaluation", "training"]
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    training = found["training"].info.run_id
    history = [(one.step, one.value) for one in opened.client.get_metric_history(training, "train/loss")]
    assert history == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found["training"].data.params == {"model.n_layer": "2"}
    assert [one.path for one in opened.client.list_artifacts(training, "reports")] == ["reports/report.json"]
    assert found["evaluation"].data.metrics == {"eval/loss": 2.0}


def test_a_store_that_a_server_has_open_is_written_next_to_it_and_both_see_all(
    root, empty_store, monkeypatch
):
    """As `make ui` does while a training runs: the server reads, the child process writes the file."""
    (root / "mlflow.db").write_bytes(empty_store)
    (root / "server.db").unlink()
    (root / "server.db").symlink_to(root / "mlflow.db")
    server = Server(root)
    server.start()
    try:
        run = journal(root)
        (root / "report.json").write_text("{}")
        run.artifact(root / "report.json", "reports")
        for step in (1, 2):
            run.metrics({"train/loss": 4.0 - step}, step)
            assert not copy(root)
            with monkeypatch.context() as patched:
                patched.setenv("MLFLOW_TRACKING_URI", server.uri)
                (found,) = runs(root)
                client = open_store(root).client
                assert len(client.get_metric_history(found.info.run_id, "train/loss")) == step
                client.set_tag(found.info.run_id, f"looked.{step}", "yes")  # the page writes too
        run.end("FINISHED")
        sync(root)
        (found,) = runs(root)
        assert found.info.status == "FINISHED"
        assert {"looked.1", "looked.2"} <= set(found.data.tags)
        address = f"{server.uri}/get-artifact?path=reports/report.json&run_id={found.info.run_id}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.read() == b"{}"
        journal(root, "download").end("FINISHED")
    finally:
        server.kill()
        server.log.close()


def test_a_served_model_answers_within_its_context_and_ends_at_sigterm(root, monkeypatch):
    (root / "server.db").rename(root / "mlflow.db")
    (root / "dvc.yaml").write_text("stages: {training: {cmd: x}, evaluation: {cmd: x}}")
    (root / "params.yaml").write_text("model: {n_layer: 2}")
    encoding = save_tokenizer(root / "data/tokenizer")
    save_split(root / "data/tokens/val.tokens", encoding)
    save_model(tiny_gpt(encoding.n_vocab, block_size=512, n_layer=8, n_embd=256), root / "models/compact", {})
    register(root)
    promote(open_store(root), weights(root))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [
        "models",
        "serve",
        "-m",
        "models:/compactgpt@champion",
        "--env-manager",
        "local",
        "-h",
        "127.0.0.1",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "PATH": path}
    with open(root / "serve.log", "wb") as log:
        served = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "-p", address.rpartition(":")[2]],
            stdout=log, stderr=log, env=env, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"{address}/ping", served)
        begin = time.monotonic()
        answer = ask(address, max_new_tokens=100_000)
        assert len(encoding.encode_ordinary(answer["predictions"][0])) < 512
        asking = threading.Thread(target=ask, args=(address,), daemon=True)
        asking.start()
        time.sleep(0.3)
        begin = time.monotonic()
        served.terminate()
        served.wait(10)
        while is_running(served.pid):
            assert time.monotonic() - begin < 60, "the worker outlives its SIGTERM"
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(served.pid, signal.SIGKILL)
        served.wait()


def ask(address, **params):
    """Send two prompts; the second is longer than the context."""
    body = json.dumps({"inputs": ["the cat", "the cat " * 900], "params": params}).encode()
    request = urllib.request.Request(
        f"{address}/invocations", body, {"Content-Type": "application/json"}, method="POST"
    )
    with suppress(ConnectionError), urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
    return {}


def is_running(group):
    """Whether a process of a group is left: the worker may still write an answer."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
