"""Files that are written complete or not at all, and checked against their hashes when they are read.

Every file of the project that must last is written here. A file is written next to its final path, synced to
the disk and renamed. A folder is filled under a temporary name, gets a manifest with the size and SHA-256 of
each of its files, and is renamed as one. An existing folder is replaced only if it is empty or an earlier
output of the same kind: see `check_replaceable`.
"""

import glob
import hashlib
import json
import os
import pwd
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from compactgpt.common.errors import (
    BadData,
    MissingInput,
    NotAllowed,
    OutsideFolder,
    UserError,
    user_error_of,
)

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(\d+)\.compactgpt-(?:tmp|old)")


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise a full or failing disk, or a lack of permission, as a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if user_error := user_error_of(error, path):
            raise user_error from error
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that their names survive a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


def _temporary_path(path: Path, suffix: str = "tmp") -> Path:
    """Return a path next to `path` for this process to work on, after deleting those of killed processes."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = _LEFTOVER.fullmatch(leftover.name.removeprefix(f".{path.name}"))
        if not match or _is_running(int(match[1])):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.compactgpt-{suffix}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` only when the block ends without an error."""
    temporary = _temporary_path(path)
    try:
        with _system_errors(path):
            make_folder(path.parent)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # then the next writer of this path deletes it
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file complete or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8, complete or not at all."""
    write_bytes(path, content.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON in the project's one form: sorted keys, finite numbers only.

    Raises:
        ValueError: the value contains NaN or an infinity.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file complete or not at all."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote.

    Raises:
        MissingInput: there is no such file.
        BadData: it is not strict JSON.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to create it") from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is not valid JSON ({error}): delete it and run `dvc repro`") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def tensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the beginning of a safetensors file; the bytes of the tensors follow in the same order.

    The format (github.com/huggingface/safetensors, README.md): length of the header in 8 bytes, the header as
    JSON padded with spaces to a multiple of 8, the tensors. The library itself needs all tensors in memory.

    Args:
        tensors: name, type as the format calls it (F32), shape and number of bytes of each.
    """
    fields, offset = {}, 0
    for name, dtype, shape, size in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(fields, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str, *, follow: bool = True) -> Path:
    """Return the path of a file by its name in a folder, after checking that it is in that folder.

    Args:
        folder: any.
        name: from a lock file, a manifest or the like, which another person may have written.
        follow: check symbolic links, too. DVC itself may link outputs to its cache.

    Raises:
        OutsideFolder: the name is absolute or has `..`, or a symbolic link points out of the folder.
    """
    path = folder / name
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OutsideFolder(f"the path {name!r} is outside of the project: nothing was read or written there")
    if follow and not path.resolve().is_relative_to(folder.resolve()):
        raise OutsideFolder(f"{path} is a symbolic link out of {folder}: nothing was read or written there")
    return path


def check_replaceable(folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """Return the folder with links resolved, after checking that replacing it deletes no other files.

    Args:
        folder: where an output goes; it may be missing.
        is_own: whether a folder that is not empty is an earlier output of the caller.

    Raises:
        NotAllowed: it is the current folder, a home folder, a mount point, the root of a repository, or a
            parent of the first two; it is a file; or it is neither empty nor an earlier output.
    """
    advice = "give a new or an empty folder"
    try:
        found = folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a loop, before Python 3.13
        raise NotAllowed(f"{folder} is a symbolic link in a loop of links: {advice}") from error
    if reason := _reason_to_protect(found):
        raise NotAllowed(f"{folder} is {reason}, which is never replaced: {advice}")
    if found.exists() and not found.is_dir():
        raise NotAllowed(f"{folder} is a file: {advice}")
    if found.is_dir() and any(found.iterdir()) and not is_own(found):
        raise NotAllowed(f"{folder} has files that this command did not write: {advice}")
    return found


def _reason_to_protect(folder: Path) -> str:
    """Return what a folder is that no output may replace; empty for any other folder."""
    here, homes = Path.cwd(), set()
    with suppress(RuntimeError):  # in a container HOME may be unset, and the user not in the list of users
        homes.add(Path.home().resolve())
    with suppress(KeyError):
        homes.add(Path(pwd.getpwuid(os.getuid()).pw_dir).resolve())
    if folder in (here, *here.parents):
        return "the current folder" if folder == here else "a parent of the current folder"
    if any(folder in (home, *home.parents) for home in homes):
        return "a home folder" if folder in homes else "a parent of a home folder"
    if any((folder / name).exists() for name in (".git", ".dvc")):
        return "the root of a repository"
    return "a mount point" if folder.is_mount() else ""


@contextmanager
def atomic_folder(
    folder: Path,
    facts: dict[str, Any] | None = None,
    *,
    kind: str = "",
    overwrite: bool = False,
    private: bool = False,
) -> Iterator[Path]:
    """Fill a temporary folder that replaces `folder` when the block ends without an error.

    Args:
        folder: where the finished folder goes; an earlier output of this kind is replaced.
        facts: what the manifest has besides its list of files. The dict may be filled inside the block.
        kind: names the kind of output in the manifest.
        overwrite: replace an earlier output also if its files have changed since.
        private: `folder` is under .state, where the user keeps no files: replace a damaged one too.

    Raises:
        NotAllowed: `folder` may have files that the caller did not write; see `check_replaceable`.
    """

    def is_own(found: Path) -> bool:
        return private or _is_earlier_output(found, kind, overwrite=overwrite)

    target = check_replaceable(folder, is_own)
    temporary = _temporary_path(target)
    try:
        with _system_errors(folder):
            make_folder(target.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            _write_manifest(temporary, {**(facts or {}), **({"kind": kind} if kind else {})})
            check_replaceable(folder, is_own)  # again: the block may have taken hours
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_earlier_output(folder: Path, kind: str, *, overwrite: bool) -> bool:
    """Return whether the manifest names this kind; a folder that has changed since is not allowed."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    if manifest.get("kind", "") != kind:
        return False
    if change := _first_change(folder, manifest["files"], added_only=overwrite):
        raise NotAllowed(
            f"{change}: it was changed since {folder} was written; save it elsewhere, then delete the "
            "folder (`compactgpt export --overwrite` replaces changed files, not added ones)"
        )
    return True


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder, and make all of it survive a power loss."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        elif path.name != MANIFEST:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / MANIFEST, {**facts, "files": files})  # also syncs the names in the folder


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Put a folder in the place of another. Between the two renames there is none, never half of one."""
    old = _temporary_path(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # from an earlier call, if the disk refused to delete it
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        with suppress(OSError):
            os.rename(old, folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest without checking the files that it names.

    Returns:
        The facts that the writer gave, and `files`: `sha256` and `bytes` of each, by path.

    Raises:
        MissingInput: the folder or its manifest is missing.
        BadData: it is not a valid manifest.
    """
    path = folder / MANIFEST
    manifest: dict[str, Any] = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise BadData(f"{path} does not list files with their hashes: delete {folder} and run `dvc repro`")
    return manifest


def _is_entry(entry: Any) -> bool:
    keys = {"sha256": str, "bytes": int}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in keys.items())


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check every file that it names: see `read_manifest`.

    Raises:
        MissingInput: the folder or its manifest is missing.
        BadData: a file is missing, has another size or hash, or is not in the manifest.
    """
    manifest = read_manifest(folder)
    if change := _first_change(folder, manifest["files"]):
        raise BadData(f"{change}: delete {folder} and run `dvc repro`")
    return manifest


def _first_change(folder: Path, files: Mapping[str, Any], *, added_only: bool = False) -> str:
    """Describe the first file, link or empty folder that is not in a folder's manifest.

    Without `added_only`, then the first file that is missing or has changed. Empty if there is none.
    """
    listed = {folder / name for name in files}
    outputs = {folder, *(path.parent for path in listed)}  # an output inside an output has its own manifest
    for path in sorted(folder.rglob("*")):
        if path in listed or (path.name == MANIFEST and path.parent in outputs):
            continue
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            return f"{path} is not in the manifest"
    for name in () if added_only else sorted(files):
        if difference := _difference(folder / name, files[name]["sha256"], files[name]["bytes"]):
            return difference
    return ""


def _difference(path: Path, sha256: str, size: int | None) -> str:
    """Describe how a file differs from its recorded hash and size; empty if it does not."""
    if not path.is_file():
        return f"{path} is missing"
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{path} has {found:,} bytes where {size:,} were written, so it was cut short or altered"
    actual = sha256_file(path)
    return "" if actual == sha256 else f"{path} was altered: its SHA-256 is {actual}, expected {sha256}"


def verify_file(path: Path, sha256: str, size: int | None = None) -> None:
    """Check one file against its recorded hash and, if given, its size in bytes.

    Raises:
        MissingInput: it is missing.
        BadData: it differs.
    """
    if difference := _difference(path, sha256, size):
        kind = BadData if path.is_file() else MissingInput
        raise kind(f"{difference}; delete it and run `dvc repro`")
