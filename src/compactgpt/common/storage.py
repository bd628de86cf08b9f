"""Write files complete or not at all, and check them against their hashes.

A written folder has a manifest with the size and SHA-256 of each file.
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
    """Call fsync on a folder, so that its list of files is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and write their names to the disk (fsync)."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        fsync_folder(path.parent)


def temporary_path(path: Path, suffix: str = "tmp") -> Path:
    """Return a temporary path next to `path`; delete the temporary files that killed processes left."""
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
        os.kill(pid, 0)  # signal 0 checks that the process exists, and does nothing to it
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists, but belongs to another user
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield an open binary file that replaces `path` when the `with` block succeeds."""
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
        with suppress(OSError):  # if this fails, the next writer of `path` deletes the file
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file complete or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a file in UTF-8, complete or not at all."""
    write_bytes(path, content.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON with sorted keys; raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file complete or not at all."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises MissingInput, or BadData if it is not valid JSON."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` in the repository folder") from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is not valid JSON ({error}): delete it and run `dvc repro`") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str, *, follow: bool = True) -> Path:
    """Return the path `folder / name`; raises OutsideFolder if it is outside of the folder.

    With `follow=False`, the path may be a symbolic link to a file outside of the folder, because DVC can
    store its outputs as links to its cache.
    """
    path = folder / name
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OutsideFolder(f"the path {name!r} is outside of the project, so it was not read or written")
    if follow and not path.resolve().is_relative_to(folder.resolve()):
        raise OutsideFolder(f"{path} is a symbolic link out of {folder}, so it was not used")
    return path


@contextmanager
def atomic_folder(
    folder: Path,
    facts: dict[str, Any] | None = None,  # more keys for the manifest; the `with` block may change them
    *,
    kind: str = "",  # the kind of content, such as `model`, for the manifest
    overwrite: bool = False,  # replace `folder` even if its files were changed, but not if files were added
    force: bool = False,  # replace `folder` whatever files it has: only for folders under .state
) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the `with` block succeeds.

    Raises NotAllowed and keeps `folder` if it has files but no manifest of this `kind`, or if files were
    added, changed or deleted after the manifest was written. With `overwrite`, changed and deleted files are
    allowed. With `force`, the manifest is not checked.
    """
    target = folder.resolve()
    temporary = temporary_path(target)
    _check_replaceable(target, kind, overwrite=overwrite, force=force)
    try:
        make_folder(target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary, {**(facts or {}), **({"kind": kind} if kind else {})})
        # Check a second time: a user may have changed `folder` during the `with` block.
        _check_replaceable(target, kind, overwrite=overwrite, force=force)
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, kind: str, *, overwrite: bool, force: bool) -> None:
    advice = "give a new or an empty folder"
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        raise NotAllowed(f"{folder} has the current folder in it, or is a mount point: {advice}")
    if folder.exists() and not folder.is_dir():
        raise NotAllowed(f"{folder} is a file: {advice}")
    if force or not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = {}
    if manifest.get("kind", "") != kind or "files" not in manifest:
        raise NotAllowed(f"{folder} has files that this command did not write: {advice}")
    if change := _first_change(folder, manifest["files"], added_only=overwrite):
        raise NotAllowed(
            f"{change}, so {folder} was changed since it was written: delete the folder after you have "
            "copied what you need (`compactgpt export --overwrite` replaces changed files)"
        )


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write all files of a folder to the disk (fsync), then its manifest, which also contains `facts`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        elif path.name != MANIFEST:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / MANIFEST, {**facts, "files": files})  # also calls fsync on the folder


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Replace `folder` with `temporary` by two renames, between which `folder` does not exist."""
    old = temporary_path(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # an earlier call that failed may have left this folder
        os.rename(folder, old)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest without a check of the files.

    The manifest's key `files` maps each path to `bytes` and `sha256`. Raises MissingInput if the manifest
    does not exist, and BadData if it is not valid.
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
    """Return a folder's manifest; raises BadData if a file is missing, altered or not listed."""
    manifest = read_manifest(folder)
    if change := _first_change(folder, manifest["files"]):
        raise BadData(f"{change}: delete {folder} and run `dvc repro`")
    return manifest


def _first_change(folder: Path, files: Mapping[str, Any], *, added_only: bool = False) -> str:
    """Return a message about the first file that was added, changed or deleted since `files` were listed.

    Returns an empty string if no file differs. With `added_only`, ignores changed and deleted files.
    """
    listed = {folder / name for name in files}
    # `files` does not list manifests. A manifest may be in `folder`, and next to each listed file.
    with_manifest = {folder, *(path.parent for path in listed)}
    for path in sorted(folder.rglob("*")):
        if path in listed or (path.name == MANIFEST and path.parent in with_manifest):
            continue
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            return f"{path} is not in the manifest"
    found = (_difference(folder / name, files[name]) for name in sorted(files))
    return "" if added_only else next(filter(None, found), "")


def _difference(path: Path, entry: Mapping[str, Any]) -> str:
    """Return how a file differs from its manifest entry; if it does not differ, an empty string."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {size:,} bytes, but the manifest lists {entry['bytes']:,} bytes"
    if (actual := sha256_file(path)) != entry["sha256"]:
        return f"{path} was altered: its SHA-256 is {actual}, expected {entry['sha256']}"
    return ""


def verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise BadData if a file differs from its entry in the manifest."""
    if difference := _difference(path, entry):
        raise BadData(f"{difference}: delete it and run `dvc repro`")
