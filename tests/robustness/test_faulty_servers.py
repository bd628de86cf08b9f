"""A server that stalls, cuts its answer or talks nonsense: one sentence within a bound, and nothing is kept.

A real server on the loopback, real clients (pip, the hub's, MLflow's) with their waiting times shortened.
"""

import hashlib
import io
import os
import socket
import threading
import time
import zipfile
from contextlib import suppress

import pytest

from compactgpt.common.errors import BadData, Unreachable
from compactgpt.data import hub, wheels
from compactgpt.tracking.journal import journal_lines
from compactgpt.tracking.mlflow_logger import sync
from tests.support.tracking_store import journal, runs

FAULTS = ("stall", "cut", "mute", "refused", "nonsense")
SLOW = [
    pytest.param(fault, marks=pytest.mark.robustness) for fault in FAULTS[2:]
]  # pip takes two seconds to start
SECONDS = 25  # of a busy machine; pip alone takes two
CONTENT = hashlib.sha256(b"content").hexdigest()
SHA = "0123456789abcdef0123456789abcdef01234567"


def tiny_wheel():
    """A wheel that pip accepts, large enough to be cut in half."""
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("tiny/a.bin", b"content")
        archive.writestr("tiny/pad.bin", os.urandom(50_000))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


WHEEL = tiny_wheel()


class Server:
    """Answers on a free port of the loopback as `fault` says, one thread a connection."""

    def __init__(self):
        self.fault = ""
        self.asked = []
        self._open = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with suppress(OSError, IndexError):
            path = connection.recv(65536).split()[1].decode()
            self.asked.append(path)
            status, kind, body = self._page(path)
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode() if self.fault != "mute" else b"")
            if self.fault in ("mute", "stall"):
                connection.sendall(body[: len(body) // 2] if self.fault == "stall" else b"")
                return  # and leaves the connection open
            connection.sendall(body[: len(body) // 2] if self.fault == "cut" else body)
            connection.close()

    def _page(self, path):
        if self.fault == "refused":
            return "503 Service Unavailable", "text/plain", b"come back later"
        if self.fault == "nonsense":
            return "200 OK", "text/html", b"<html>a hotel's page: log in</html>"
        if path.startswith("/simple/"):
            digest = hashlib.sha256(WHEEL).hexdigest()
            link = f'<a href="/files/tiny-1.0-py3-none-any.whl#sha256={digest}">tiny-1.0-py3-none-any.whl</a>'
            return "200 OK", "text/html", f"<!DOCTYPE html><html><body>{link}</body></html>".encode()
        return "200 OK", "application/octet-stream", WHEEL

    def close(self):
        self._socket.close()
        for connection in self._open:
            connection.close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture
def pip(server, monkeypatch):
    """The user's pip configuration: the server is the index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setattr(wheels, "_TIMEOUT_SECONDS", "1")


def fetch(folder):
    return wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, folder / "cache")


@pytest.mark.parametrize("fault", [*FAULTS[:2], *SLOW])
def test_an_index_that_misbehaves_is_one_sentence_in_time_and_leaves_nothing(tmp_path, server, pip, fault):
    server.fault, begin = fault, time.monotonic()
    with pytest.raises((Unreachable, BadData), match=r"tiny==1\.0 .*run the same command again") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < SECONDS
    assert list((tmp_path / "cache").iterdir()) == []
    assert server.asked
    if fault == "cut":
        server.fault = ""
        assert fetch(tmp_path).read_bytes() == b"content"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_misbehaves_is_one_sentence_in_time(server, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.3)
    server.fault, begin = fault, time.monotonic()
    says = "the hub can't be reached for owner/name .*check the network"
    with pytest.raises(Unreachable, match=says) as caught:
        hub.require_on_hub("dataset", "owner/name", SHA, "mend it")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracking_server_that_misbehaves_is_left_in_time_and_loses_nothing(
    tmp_path, server, empty_store, monkeypatch, fault
):
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://me:planted@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.fault = fault
    run = journal(tmp_path)
    begin = time.monotonic()
    run.metrics({"loss": 3.0}, step=1)  # no stage waits for it
    run.end("FINISHED")
    assert time.monotonic() - begin < 1
    with pytest.raises(Unreachable, match=r"^MLflow at .+ failed \(.+\): no run is lost") as caught:
        sync(tmp_path)
    assert "\n" not in str(caught.value)
    assert "planted" not in str(caught.value)
    assert time.monotonic() - begin < SECONDS
    assert server.asked
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert runs(tmp_path) == []  # it is meant for the server, and kept for it
    assert journal_lines((run.folder / "journal.jsonl").read_bytes())[-1]["status"] == "FINISHED"
