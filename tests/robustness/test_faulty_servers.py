"""A server that stalls, cuts its answer or sends nonsense: one message in time, and nothing is kept.

A real server on the loopback, and real clients (pip, the hub's, MLflow's) with shorter timeouts.
"""

import os
import socketserver
import threading
import time
import zipfile
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO

import pytest

from compactgpt.common.errors import BadData, Unreachable
from compactgpt.data import hub, wheels
from compactgpt.tracking.journal import journal_lines
from compactgpt.tracking.mlflow_logger import sync
from tests.support.tracking_store import journal, runs

FAULTS = ["stall", "cut", "mute", "refused", "nonsense"]
SECONDS = 25  # on a busy machine
NAME = "tiny-1.0-py3-none-any.whl"


def make_wheel():
    """A wheel that pip accepts, large enough to be cut in half."""
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(buffer := BytesIO(), "w") as archive:
        archive.writestr("tiny/a.bin", b"content")
        archive.writestr("tiny/pad.bin", os.urandom(50_000))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


WHEEL = make_wheel()
LINK = f'<a href="/files/{NAME}#sha256={sha256(WHEEL).hexdigest()}">{NAME}</a>'


class Handler(socketserver.BaseRequestHandler):
    """Answers one request with the fault of the server."""

    def handle(self):
        request, fault = self.request.recv(65536), self.server.fault
        self.server.asked = True
        status, kind, body = "200 OK", "application/octet-stream", WHEEL
        if fault == "refused":
            status, kind, body = "503 Service Unavailable", "text/plain", b"come back later"
        elif fault == "nonsense":
            kind, body = "text/html", b"<html>a hotel's page: log in</html>"
        elif b" /simple/" in request:
            kind, body = "text/html", f"<!DOCTYPE html><html><body>{LINK}</body></html>".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        if fault != "mute":
            self.request.sendall(f"{head}Connection: close\r\n\r\n".encode())
            self.request.sendall(body[: len(body) // 2] if fault in ("stall", "cut") else body)
        if fault in ("mute", "stall"):
            self.server.closing.wait()  # leaves the connection open


@pytest.fixture
def server():
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        fault, asked, closing = "", False, threading.Event()

        def handle_error(self, *_):
            pass  # the client has closed the connection

    with Server(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@contextmanager
def raises_in_time(errors, message):
    start = time.monotonic()
    with pytest.raises(errors, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert "planted" not in str(caught.value)  # a password
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("fault", FAULTS[:2])
def test_an_index_that_misbehaves_is_one_message_and_leaves_nothing(tmp_path, server, monkeypatch, fault):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    pip = {"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "INDEX_URL": f"{server.url}/simple"}
    for name, value in pip.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(wheels, "_TIMEOUT_SECONDS", "1")
    wanted = ("tiny==1.0", "tiny/a.bin", sha256(b"content").hexdigest(), tmp_path / "cache")
    server.fault = fault
    with raises_in_time((Unreachable, BadData), r"tiny==1\.0 .*run the same command again"):
        wheels.fetch_wheel_member(*wanted)
    assert list((tmp_path / "cache").iterdir()) == []
    assert server.asked
    if fault == "cut":
        server.fault = ""
        assert wheels.fetch_wheel_member(*wanted).read_bytes() == b"content"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_misbehaves_is_one_message(server, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.3)
    server.fault = fault
    with raises_in_time(Unreachable, "the hub can't be reached for owner/name .*check the network"):
        hub.require_on_hub("dataset", "owner/name", "a" * 40, "correct it")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracking_server_that_misbehaves_is_left_and_loses_nothing(
    tmp_path, server, empty_store, monkeypatch, capsys, fault
):
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://me:planted@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.fault = fault
    run = journal(tmp_path)
    start = time.monotonic()
    run.metrics({"loss": 3.0}, step=1)  # no stage waits for the server
    run.end("FINISHED")
    assert time.monotonic() - start < 1
    with raises_in_time(Unreachable, r"^MLflow at .+ failed \(.+\): no run is lost"):
        sync(tmp_path)
    said = f"copying 1 run to MLflow at {server.url.replace('//', '//***@')}\n"
    assert said in capsys.readouterr().err
    assert server.asked
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert runs(tmp_path) == []  # the run is kept for the server
    assert journal_lines((run.folder / "journal.jsonl").read_bytes())[-1]["status"] == "FINISHED"
