"""Files that are written complete or not at all, and checked against their hashes when they are read.

A file is written next to its final path, synced to the disk, and renamed. A folder is filled under a
temporary name, gets a manifest with the size and SHA-256 of each file, and is renamed as a whole. A folder is
replaced only if it is empty, or an earlier output of the same kind.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from compactgpt.common.errors import BadData, MissingInput, NotAllowed, OutsideFolder, UserError

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(\d+)\.compactgpt-(?:tmp|old)")


def fsync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that files created or renamed in it survive a power loss."""
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


def temporary_path(path: Path, suffix: str = "tmp") -> Path:
    """Return a path next to `path` for this process, and delete those of killed processes."""
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
    temporary = temporary_path(path)
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # if this fails, the next writer of `path` deletes the temporary file
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file complete or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8, complete or not at all."""
    write_bytes(path, content.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON with sorted keys. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file complete or not at all."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote. Raises MissingInput, or BadData if it is not strict JSON."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to create it") from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is not valid JSON ({error}): delete it and run `dvc repro`") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str, *, follow: bool = True) -> Path:
    """Return the path of the file `name` in a folder. The name may come from another person.

    Raises OutsideFolder if the name is absolute or has `..`, or, with `follow`, if a symbolic link leads out.
    Use `follow=False` for outputs of DVC, which may be links to its cache.
    """
    path = folder / name
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OutsideFolder(f"the path {name!r} is outside of the project: nothing was read or written there")
    if follow and not path.resolve().is_relative_to(folder.resolve()):
        raise OutsideFolder(f"{path} is a symbolic link out of {folder}: nothing was read or written there")
    return path


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

    The manifest gets `kind`, `facts` and the list of files. The block may still change `facts`. With
    `overwrite`, an earlier output is replaced even if its files have changed. With `private`, any content is
    replaced: use it only under .state, where users keep no files. Raises NotAllowed if `folder` has files
    that the caller did not write.
    """
    target = folder.resolve()
    temporary = temporary_path(target)
    _check_replaceable(target, kind, overwrite=overwrite, private=private)
    try:
        make_folder(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary, {**(facts or {}), **({"kind": kind} if kind else {})})
        # Check again: the block may have taken hours, and `folder` may have changed since.
        _check_replaceable(target, kind, overwrite=overwrite, private=private)
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, kind: str, *, overwrite: bool, private: bool) -> None:
    """Raise NotAllowed unless a folder is missing, empty, or an unchanged earlier output of this kind."""
    advice = "give a new or an empty folder"
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        raise NotAllowed(f"{folder} has the current folder in it, or is a mount point: {advice}")
    if folder.exists() and not folder.is_dir():
        raise NotAllowed(f"{folder} is a file: {advice}")
    if private or not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = {}
    if manifest.get("kind", "") != kind or "files" not in manifest:
        raise NotAllowed(f"{folder} has files that this command did not write: {advice}")
    if change := _first_change(folder, manifest["files"], added_only=overwrite):
        raise NotAllowed(
            f"{change}: it was changed since {folder} was written; save it elsewhere, then delete the "
            "folder (`compactgpt export --overwrite` replaces changed files, not added ones)"
        )


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder, and make all files of the folder survive a power loss."""
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
    """Replace `folder` by two renames. Between the two renames no folder has the path of `folder`."""
    old = temporary_path(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # an earlier call may have failed to delete it
        os.rename(folder, old)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest: the writer's facts, and `files` with `sha256` and `bytes` of each path.

    The files themselves are not checked. Raises MissingInput, or BadData if the manifest is not valid.
    """
    path = folder / MANIFEST
    manifest: dict[str, Any] = read_json(path)
    try:
        for entry in manifest["files"].values():
            assert isinstance(entry["sha256"], str)
            assert isinstance(entry["bytes"], int)
    except (AssertionError, AttributeError, LookupError, TypeError) as error:
        raise BadData(
            f"{path} does not list files with their hashes: delete {folder} and run `dvc repro`"
        ) from error
    return manifest


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check every file of the folder.

    Raises MissingInput if there is no manifest, or BadData if a file is missing, altered or not in it.
    """
    manifest = read_manifest(folder)
    if change := _first_change(folder, manifest["files"]):
        raise BadData(f"{change}: delete {folder} and run `dvc repro`")
    return manifest


def _first_change(folder: Path, files: Mapping[str, Any], *, added_only: bool = False) -> str:
    """Describe a file, link or empty folder that a manifest does not have; empty if there is none.

    Without `added_only`, also describe the first file that is missing or has changed.
    """
    listed = {folder / name for name in files}
    outputs = {folder, *(path.parent for path in listed)}  # an output inside an output has its own manifest
    for path in sorted(folder.rglob("*")):
        if path in listed or (path.name == MANIFEST and path.parent in outputs):
            continue
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            return f"{path} is not in the manifest"
    found = (
        _difference(folder / name, files[name]["sha256"], files[name]["bytes"]) for name in sorted(files)
    )
    return "" if added_only else next(filter(None, found), "")


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
    """Check a file against its recorded hash and size. Raises MissingInput, or BadData if it differs."""
    if difference := _difference(path, sha256, size):
        kind = BadData if path.is_file() else MissingInput
        raise kind(f"{difference}; delete it and run `dvc repro`")
