"""A file of a wheel is downloaded once and checked on every use."""

import hashlib
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from compactgpt.common.errors import BadData, Unreachable
from compactgpt.data import wheels

CONTENT = hashlib.sha256(b"content").hexdigest()


def wheel_bytes(members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(buffer := BytesIO(), "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def fetch(tmp_path):
    return wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")


@pytest.fixture
def pip(monkeypatch):
    """A function that replaces pip by one that leaves `content` as the wheel, or fails with `stderr`."""

    def install(content=b"", stderr=""):
        def run(command, **_settings):
            folder = next(word for word in command if word.startswith("--dest=")).removeprefix("--dest=")
            if not stderr:
                (Path(folder) / "tiny-1.0-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, int(bool(stderr)), "", stderr)

        monkeypatch.setattr(wheels.subprocess, "run", run)

    return install


def test_a_file_of_a_wheel_is_downloaded_once_and_checked_on_every_use(tmp_path, pip):
    """tests/robustness/test_faulty_servers.py tries it with the real pip."""
    pip(wheel_bytes({"tiny/a.bin": b"content"}))
    path = fetch(tmp_path)
    assert path.read_bytes() == b"content"
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [CONTENT]
    pip(stderr="a warning\nERROR: no such wheel")
    assert fetch(tmp_path) == path
    path.write_bytes(b"altered")
    with pytest.raises(Unreachable, match=r"can't be downloaded .*\(no such wheel\): check the network"):
        fetch(tmp_path)
    pip(wheel_bytes({"tiny/a.bin": b"content"}))
    assert fetch(tmp_path).read_bytes() == b"content"


DEFLATED = wheel_bytes({"tiny/a.bin": b"content" * 99}, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wheel_bytes({"tiny/a.bin": b"other"}), "has SHA-256 .*: the file was not kept"),
        (wheel_bytes({"tiny/b.bin": b"content"}), r"wheel tiny==1\.0 has no file tiny/a\.bin"),
        (DEFLATED[:42] + b"\xff" * 12 + DEFLATED[54:], "arrived damaged"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, pip, content, message):
    pip(content)
    with pytest.raises(BadData, match=message):
        fetch(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
