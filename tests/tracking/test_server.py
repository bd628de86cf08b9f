"""A real MLflow server on this machine, killed and restarted midway: nothing is lost, nothing doubled."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
from tests.support.tracking_store import copy, enter_project, history, journal, runs
from tests.support.trained_project import register, weights

START_SECONDS = 300.0  # of a busy machine
STAGES = "{training: {cmd: x}, evaluation: {cmd: x}}"

pytestmark = pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="starts servers: `make test-server`")


class Server:
    """A command of MLflow that serves on a free port of the loopback."""

    def __init__(self, folder: Path, ready: str, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.ready = folder, ready
        port = self.uri.rpartition(":")[2]
        self.words = [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", port]

    def start(self) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": path}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                self.words, stdout=log, stderr=log, env=env, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(self.uri + self.ready, timeout=5) as answer:
                assert answer.status == 200
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
    """`mlflow server` on the project's database, as `make ui` starts it."""
    server = Server(
        root, "/health", "server", "--backend-store-uri", f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination", str(root / "mlartifacts"), "--workers", "1",
    )  # fmt: skip
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
    with pytest.raises(Unreachable, match=f"{server.uri} failed .Connection refused"):
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


def test_a_served_model_answers_within_its_context_and_ends_at_sigterm(root, monkeypatch):
    (root / "params.yaml").write_text("model: {n_layer: 2}")
    encoding = save_tokenizer(root / "data/tokenizer")
    save_split(root / "data/tokens/val.tokens", encoding)
    save_model(tiny_gpt(encoding.n_vocab, block_size=512, n_layer=8, n_embd=256), root / "models/compact", {})
    register(root)
    promote(open_store(root), weights(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    words = ["models", "serve", "-m", "models:/compactgpt@champion", "--env-manager", "local"]
    served = Server(root, "/ping", *words)
    served.start()
    try:
        answer = ask(served.uri, max_new_tokens=100_000)
        assert len(encoding.encode_ordinary(answer["predictions"][0])) < 512
        threading.Thread(target=ask, args=(served.uri,), daemon=True).start()
        time.sleep(0.3)
        begin = time.monotonic()
        served.process.terminate()
        served.process.wait(10)
        with suppress(ProcessLookupError):  # the worker may still write an answer
            while time.monotonic() - begin < 60:
                os.killpg(served.process.pid, 0)
                time.sleep(0.2)
            raise AssertionError("the worker outlives its SIGTERM")
    finally:
        served.kill()


def ask(address: str, **params) -> dict:
    """Send two prompts; the second is longer than the context."""
    body = json.dumps({"inputs": ["the cat", "the cat " * 900], "params": params}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", body, headers, method="POST")
    with suppress(ConnectionError), urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
    return {}
