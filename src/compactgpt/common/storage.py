"""Files written whole or not at all, and verified when they are read.

Every durable file of the project goes through here. A file is written beside its place, synced,
and renamed; a folder is filled under a temporary name, closed with a manifest of the size and SHA-256
of each of its files, and renamed as one. A reader of a folder checks it against its manifest first.
A folder is replaced only if it is empty or an earlier output of the same kind: see `replaceable`.
"""

import errno
import glob
import hashlib
import json
import math
import os
import pwd
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from compactgpt.common.errors import (
    BadData,
    DiskFailed,
    DiskFull,
    MissingInput,
    NotAllowed,
    OutsideFolder,
    UserError,
)

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(\d+)\.compactgpt-(?:tmp|old)")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into one clear sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise DiskFailed(
                f"the disk failed while writing {path}: nothing was changed there; "
                "see to the disk, then run the same command again"
            ) from error
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFull(
            f"no room left on the disk while writing {path}: nothing was changed there; "
            "free some space and run the same command again"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that all their names survive a power loss."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        fsync_folder(made.parent)


def _temporary(path: Path, kind: str = "tmp") -> Path:
    """Name the place beside `path` where this process works, after sweeping what killed ones left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = _LEFTOVER.fullmatch(left.name.removeprefix(f".{path.name}"))
        if not match or _is_alive(int(match[1])):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.compactgpt-{kind}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that takes its place at `path` only when the block ends well."""
    temporary = _temporary(path)
    try:
        with _disk_errors(path):
            make_folder(path.parent)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # the next writer of this place sweeps it
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, content.encode("utf-8"))


def json_bytes(value: Any) -> bytes:
    """Render `value` as the one JSON text that the project uses: sorted keys, finite numbers only.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, whole or not at all."""
    write_bytes(path, json_bytes(value))


def tensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Begin a safetensors file, which the tensors' own bytes continue in the same order.

    The layout (github.com/huggingface/safetensors, README.md, Format): length of the header in 8 bytes,
    the header as JSON padded with spaces to a multiple of 8, the tensors. The library's own writer has wider
    types first, then the order of names.

    Args:
        tensors: name, type as the format calls it (F32), shape and bytes of each.
    """
    fields, place = {}, 0
    for name, dtype, shape, size in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(fields, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        MissingInput: there is no such file.
        BadData: it is not strict JSON.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it") from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is no valid JSON ({error}): delete it and run `dvc repro`") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def all_finite(value: Any) -> bool:
    """Tell whether every float inside nested dicts and lists is finite."""
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(all_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def sha256_file(path: Path) -> str:
    """Hash a file, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def replaceable(folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """Return the folder with links resolved, after checking that no one else's files are deleted.

    Args:
        folder: the place of an output; it may be missing.
        is_own: whether a folder that is not empty is an earlier output of the caller.

    Raises:
        NotAllowed: it is the current folder, a home folder, a mount point, the root of a repository, or a
            parent of the first two; it is a file; or it is neither empty nor an earlier output.
    """
    advice = "name a new or an empty folder"
    try:
        found = folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a loop, before Python 3.13
        raise NotAllowed(f"{folder} is a symbolic link that leads nowhere: {advice}") from error
    if what := _protected(found):
        raise NotAllowed(f"{folder} is {what}, which is never replaced: {advice}")
    if found.exists() and not found.is_dir():
        raise NotAllowed(f"{folder} is a file: {advice}")
    if found.is_dir() and any(found.iterdir()) and not is_own(found):
        raise NotAllowed(f"{folder} has files that this command did not write: {advice}")
    return found


def _protected(folder: Path) -> str:
    """Say what a folder is that no output may replace; empty for any other."""
    here, homes = Path.cwd(), set()
    with suppress(RuntimeError):  # HOME is not set, and the user is not in the list of users (containers)
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


def _is_earlier_output(folder: Path, kind: str, *, overwrite: bool) -> bool:
    """Whether the manifest names this kind; a folder that has changed since needs `overwrite`."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    if manifest.get("kind", "") != kind:
        return False
    if changed := _changed_file(folder, manifest["files"], overwrite=overwrite):
        raise NotAllowed(
            f"{changed} was changed since {folder} was written: save it elsewhere, then delete the folder "
            "(`compactgpt export --overwrite` replaces changed files, not added ones)"
        )
    return True


def _changed_file(folder: Path, named: dict[str, Any], *, overwrite: bool) -> Path | None:
    """Return the first path that a manifest does not name or, without `overwrite`, that has changed since."""
    every = [
        path
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    ]
    outputs = {
        folder,
        *((folder / name).parent for name in named),
    }  # an output in an output has a manifest too
    found = {
        path.relative_to(folder).as_posix(): path
        for path in every
        if not (path.name == MANIFEST and path.parent in outputs)
    }
    for name in sorted(found.keys() | named.keys()):
        path = found.get(name)
        if path is not None and name not in named:
            return path
        if overwrite:
            continue
        if path is None or not path.is_file():
            return folder / name
        if path.stat().st_size != named[name]["bytes"] or sha256_file(path) != named[name]["sha256"]:
            return path
    return None


@contextmanager
def atomic_folder(
    folder: Path,
    facts: dict[str, Any] | None = None,
    *,
    kind: str = "",
    overwrite: bool = False,
    private: bool = False,
) -> Iterator[Path]:
    """Fill a temporary folder that takes its place at `folder` when the block ends well.

    Args:
        folder: where the finished folder goes; an earlier output of this kind that is there is replaced.
        facts: what the manifest says beside its list of files. The dict may be filled inside the block.
        kind: names the kind of output in the manifest.
        overwrite: replace an earlier output also where files in it have changed since.
        private: `folder` is under .state, where no one else's files are: replace a damaged one too.

    Raises:
        NotAllowed: `folder` may hold files that the caller did not write; see `replaceable`.
    """

    def is_own(found: Path) -> bool:
        return private or _is_earlier_output(found, kind, overwrite=overwrite)

    target = replaceable(folder, is_own)
    temporary = _temporary(target)
    try:
        with _disk_errors(folder):
            make_folder(target.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            about = {**(facts or {}), **({"kind": kind} if kind else {})}
            _close_folder(temporary, about)
            replaceable(folder, is_own)  # again: filling it may have taken hours
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _close_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder, and make all of it survive a power loss."""
    files = {}
    for path in _files_of(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    write_json(folder / MANIFEST, {**facts, "files": files})  # syncs the names beside it


def clear_folder(folder: Path, own: Collection[str], marks: Collection[str]) -> None:
    """Delete a folder of pages or the like that an earlier run wrote, known by the names at its top.

    Args:
        folder: what is deleted, if it is there.
        own: all names that may be in it.
        marks: some of them, one of which must be in it.

    Raises:
        NotAllowed: it has other names, or must not be replaced; see `replaceable`.
    """

    def is_own(found: Path) -> bool:
        names = {path.name for path in found.iterdir()}
        return names <= set(own) and not names.isdisjoint(marks)

    found = replaceable(folder, is_own)
    if found.exists():
        old = _temporary(found, "old")  # a kill in the middle of the deletion leaves no half of it
        os.rename(found, old)
        shutil.rmtree(old, ignore_errors=True)


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Swap folders: between the two renames the place is empty, never half filled."""
    old = _temporary(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of ours, when the disk refused to remove it
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        with suppress(OSError):
            os.rename(old, folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def inside(folder: Path, name: str, *, follow: bool = True) -> Path:
    """Return the path of a file by its name in a folder, after checking that it is in that folder.

    Args:
        folder: any.
        name: from a lock file, a manifest or the like, which someone else may have written.
        follow: check where symbolic links lead, too. DVC itself may link outputs to its cache.

    Raises:
        OutsideFolder: the name is absolute or has `..`, or a symbolic link leads out of the folder.
    """
    path = folder / name
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OutsideFolder(f"the path {name!r} leads out of the project: nothing was read or written there")
    if follow and not path.resolve().is_relative_to(folder.resolve()):
        raise OutsideFolder(f"{path} is a symbolic link out of {folder}: nothing was read or written there")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest without looking at the files that it names.

    Returns:
        The facts that its maker wrote, and `files`: `sha256` and `bytes` of each by its path.

    Raises:
        MissingInput: it is missing.
        BadData: it is no manifest.
    """
    path = folder / MANIFEST
    manifest: dict[str, Any] = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise BadData(f"{path} names no files with their hashes: delete {folder} and run `dvc repro`")
    return manifest


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
    )


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest after checking every file that it names.

    Returns:
        The manifest: the facts that its maker wrote, and `files`.

    Raises:
        MissingInput: the folder or its manifest is missing.
        BadData: a file is missing, has another size or another hash, or is not in the manifest.
    """
    manifest = read_manifest(folder)
    named = manifest["files"]
    found = {path.relative_to(folder).as_posix() for path in _files_of(folder)}
    for name in sorted(found ^ set(named)):
        what = "is not in the manifest" if name in found else "is missing"
        raise BadData(f"{folder / name} {what}: delete {folder} and run `dvc repro`")
    for name, expected in named.items():
        verify_file(folder / name, expected["sha256"], expected["bytes"])
    return manifest


def verify_file(path: Path, sha256: str, size: int | None = None) -> None:
    """Check one file against its recorded hash (and size).

    Raises:
        MissingInput: it is not there.
        BadData: it differs.
    """
    if not path.is_file():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    if size is not None and path.stat().st_size != size:
        raise BadData(
            f"{path} has {path.stat().st_size:,} bytes where {size:,} were written: "
            "it was cut short or altered; delete it and run `dvc repro`"
        )
    actual = sha256_file(path)
    if actual != sha256:
        raise BadData(
            f"{path} was altered: its SHA-256 is {actual}, expected {sha256}; delete it and run `dvc repro`"
        )
