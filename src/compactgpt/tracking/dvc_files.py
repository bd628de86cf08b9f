"""What DVC knows, read from its files: the chain, the entries of dvc.lock, and the bytes that they name.

DVC itself is never imported: dvc.yaml and dvc.lock are YAML, and its cache is a folder of files named by
their MD5. Everything is read from a `Place`, which is a folder or a commit of git.
"""

import configparser
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, Field

from compactgpt.common.errors import BadData, MissingInput, OutsideFolder, UserError
from compactgpt.common.git import conflict_in, run_git
from compactgpt.common.sections import YAML_ERRORS
from compactgpt.common.storage import inside, write_bytes

LOCK, PARAMS, CHAIN = "dvc.lock", "params.yaml", "dvc.yaml"
MODEL, TOKENS, TOKENIZER = "models/compact", "data/tokens", "data/tokenizer"
Entry = dict[str, Any]  # of one stage in dvc.lock
_LOCK_COPY = Path(".dvc/tmp/compactgpt/dvc.lock")  # of each workspace its own
_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class Place(Protocol):
    """Where a version of the project is read."""

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None where there is none."""


@dataclass(frozen=True)
class Folder:
    """The project as it lies in a folder."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        try:
            return inside(self.root, path, follow=False).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


@dataclass(frozen=True)
class Commit:
    """The project as git has it."""

    root: Path
    revision: str

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        try:
            return run_git(self.root, "show", f"{self.revision}:{path}")
        except subprocess.CalledProcessError:
            return None


def git(root: Path, *words: str) -> str:
    """Ask git.

    Raises:
        UserError: git says no; the message is its own.
    """
    try:
        return run_git(root, *words).decode().strip()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or error.stdout.strip()
        raise UserError(f"git {words[0]} said: {reason.decode(errors='replace')}") from error


def parse_yaml(content: bytes | None, name: str) -> dict[str, Any]:
    """Parse a YAML file of DVC's; an absent one is empty.

    Raises:
        BadData: it is no YAML, or no mapping.
    """
    from ruamel.yaml import YAML

    if content and (conflict := conflict_in(name, content)):
        raise BadData(conflict)
    try:
        tree = YAML(typ="safe").load(content.decode()) if content else None
    except YAML_ERRORS as error:
        raise BadData(f"{name} is no valid YAML: `git checkout {name}` restores it") from error
    if not isinstance(tree, dict | None):
        raise BadData(f"{name} holds no keys with values: `git checkout {name}` restores it")
    return tree or {}


class _File(BaseModel):
    path: str
    md5: object


class _Entry(BaseModel):
    outs: list[_File] = []
    deps: list[_File] = []
    params: dict[str, dict[str, Any]] = {}


class _Lock(BaseModel):
    stages: dict[str, _Entry] = {}


class _Stage(BaseModel):
    matrix: dict[str, Any] = Field({}, max_length=1)


class _Chain(BaseModel):
    stages: dict[str, _Stage] = {}


def _tree(content: bytes | None, name: str, kind: type[BaseModel]) -> dict[str, Any]:
    """dvc.yaml or dvc.lock, of the shape that we read.

    Raises:
        BadData: they are not.
    """
    tree = parse_yaml(content, name)
    try:
        kind.model_validate(tree)
        json.dumps(tree, default=str, sort_keys=True)  # no anchor within itself, names that have an order
    except (ValueError, TypeError, RecursionError) as error:
        raise BadData(f"{name} is not as DVC has it: `git checkout {name}` restores it") from error
    for path in _paths(tree) if kind is _Lock else ():
        try:
            inside(Path(), path, follow=False)
        except OutsideFolder as error:
            raise OutsideFolder(f"{name}: {error}") from error
    return tree


def _paths(lock: dict[str, Any]) -> Iterator[str]:
    """Every path of a dvc.lock."""
    for entry in lock.get("stages", {}).values():
        for kind in ("deps", "outs"):
            yield from (one["path"] for one in entry.get(kind, ()))


@dataclass(frozen=True)
class Chain:
    """The stages of dvc.yaml in their order, and what dvc.lock says of each."""

    stages: list[str]  # those of a matrix by their full names
    entries: dict[str, Entry]
    lock: bytes = b""

    @property
    def complete(self) -> bool:
        """Whether every stage has been made."""
        return bool(self.stages) and all(stage in self.entries for stage in self.stages)

    def out(self, path: str) -> str:
        """MD5 of an out, or nothing where no stage has made it."""
        for stage in self.stages:
            for found, md5 in outs(self.entries.get(stage, {})).items():
                if found == path:
                    return md5
        return ""


def read_chain(place: Place) -> Chain:
    """Read dvc.yaml and dvc.lock.

    Raises:
        BadData: one of them is not as DVC has it.
    """
    bodies = _tree(place.read(CHAIN), CHAIN, _Chain).get("stages", {})
    params = parse_yaml(place.read(PARAMS), PARAMS)
    lock = place.read(LOCK) or b""
    stages = [full for name, body in bodies.items() for full in _full_names(name, body, params)]
    return Chain(stages, entries_of(lock), lock)


def entries_of(lock: bytes | None) -> dict[str, Entry]:
    """The stages of a dvc.lock.

    Raises:
        BadData: it is none.
    """
    stages: dict[str, Entry] = _tree(lock, LOCK, _Lock).get("stages", {})
    return stages


def _full_names(name: str, body: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
    """A stage's name, or the names of its items where it is a matrix of one variable."""
    matrix = body.get("matrix")
    if not matrix:
        yield name
        return
    (values,) = matrix.values()
    if isinstance(values, str) and (reference := _REFERENCE.fullmatch(values)):
        for part in reference[1].split("."):
            params = params.get(part, {}) if isinstance(params, Mapping) else {}
        values = params if isinstance(params, list) else []
    yield from (f"{name}@{value}" for value in values)


def keep_lock(root: Path) -> None:
    """Copy dvc.lock as a stage finds it: DVC writes it in place, and a kill leaves a part of it."""
    if (root / LOCK).is_file():
        write_bytes(root / _LOCK_COPY, (root / LOCK).read_bytes())


def restore_lock(root: Path) -> bool:
    """Restore the dvc.lock that DVC was writing when it was killed. Returns whether that was needed.

    Raises:
        BadData: it was, and no stage has kept a copy; or the file has conflict markers, which only the user
            can resolve.
    """
    lock, copy = root / LOCK, root / _LOCK_COPY
    if not lock.exists() or _is_lock(content := lock.read_bytes()):
        return False
    if conflict := conflict_in(LOCK, content):
        raise BadData(conflict)
    if not (copy.exists() and _is_lock(copy.read_bytes())):
        raise BadData(f"{LOCK} is not as DVC has it: `git checkout {LOCK}` restores it")
    write_bytes(lock, copy.read_bytes())
    return True


def _is_lock(content: bytes) -> bool:
    try:
        return "schema" in _tree(content, LOCK, _Lock)
    except OutsideFolder:  # complete, and of someone else: a copy of ours would hide that
        raise
    except BadData:
        return False


def entry_key(entry: Entry) -> str:
    """One hash for all that dvc.lock says of a stage: command, code, data, parameters, outs."""
    content = json.dumps(entry, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def outs(entry: Entry) -> dict[str, str]:
    """MD5 of each out by its path; a folder's ends in `.dir`."""
    return {out["path"]: str(out["md5"]) for out in entry.get("outs", [])}


def deps(entry: Entry) -> dict[str, str]:
    """MD5 of each dep by its path."""
    return {dep["path"]: str(dep["md5"]) for dep in entry.get("deps", [])}


def entry_params(entry: Entry) -> dict[str, Any]:
    """The parameters that a stage was made with."""
    return dict(entry.get("params", {}).get(PARAMS, {}))


def md5_of(content: bytes) -> str:
    """The hash that DVC names content by: identity, no defence."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_file(path: Path) -> str:
    """What `md5_of` says of a file's bytes, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_path(path: Path) -> str:
    """What DVC calls a file or a folder; nothing where there is none."""
    if path.is_file():
        return md5_file(path)
    if not path.is_dir():
        return ""
    files = sorted(
        (found.relative_to(path).as_posix(), found)
        for found in path.rglob("*")
        if found.is_file() and "__pycache__" not in found.parts
    )
    listing = [{"md5": md5_file(found), "relpath": name} for name, found in files]
    return md5_of(json.dumps(listing, sort_keys=True).encode()) + ".dir"


class Cache:
    """DVC's cache: content by MD5."""

    def __init__(self, root: Path) -> None:
        settings = configparser.ConfigParser()
        settings.read([root / ".dvc/config", root / ".dvc/config.local"])
        folder = settings.get("cache", "dir", fallback="cache").strip()
        self.folder = (root / ".dvc" / folder).resolve()

    def file(self, md5: str) -> Path:
        """Where an object lies, or would.

        Raises:
            OutsideFolder: this is no name of an object; as a path, it would lead anywhere.
        """
        if not _OBJECT.fullmatch(md5):
            raise OutsideFolder(f"dvc.lock names {md5!r}, which is no hash of DVC's cache")
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]

    def files(self, md5: str) -> dict[str, Path]:
        """The files of an out by their path in it, `` for a file.

        Raises:
            MissingInput: the cache lacks one.
            OutsideFolder: see `listed`.
        """
        if not md5.endswith(".dir"):
            return {"": self._present(md5)}
        return {item["relpath"]: self._present(item["md5"]) for item in self.listed(md5)}

    def listed(self, md5: str) -> list[dict[str, str]]:
        """The files of a folder as its own object lists them: `relpath` and `md5` of each.

        Raises:
            MissingInput: the cache lacks that object.
            OutsideFolder: it names a path outside of the folder.
        """
        listing: list[dict[str, str]] = json.loads(self._present(md5).read_bytes())
        for item in listing:
            inside(self.folder, item["relpath"], follow=False)
        return listing

    def objects(self, md5: str) -> list[Path]:
        """Every object that an out is made of; the cache must have them."""
        found = list(self.files(md5).values())
        return [*found, self.file(md5)] if md5.endswith(".dir") else found

    def has(self, md5: str) -> bool:
        """Whether the whole of an out is there."""
        try:
            return bool(self.files(md5)) or md5.endswith(".dir")
        except (MissingInput, ValueError):
            return False

    def _present(self, md5: str) -> Path:
        path = self.file(md5)
        if not path.is_file():
            raise MissingInput(f"DVC's cache lacks {md5}: `dvc pull` fetches it where a remote has it")
        return path


def checkout(cache: Cache, place: Place, path: str, md5: str, target: Path) -> bool:
    """Copy an out as dvc.lock names it to `target`: from the cache, else from the place itself.

    Args:
        cache: of the project.
        place: where an out that the cache lacks may lie.
        path: of the out.
        md5: what dvc.lock calls it.
        target: a place for the copy.

    Returns:
        Whether it was to be had: what lies at `path` may be of another run by now.

    Raises:
        BadData: the cache holds other bytes than it says.
    """
    if not cache.has(md5):
        content = None if md5.endswith(".dir") else place.read(path)
        if content is None or md5_of(content) != md5:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return True
    for name, source in cache.files(md5).items():
        copy = inside(target, name) if name else target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        if md5_file(copy) != source.parent.name + source.name:
            raise BadData(f"{source} was altered: `dvc repro -f` or `dvc pull` makes it again")
    return True


def experiment_commit(root: Path, name: str) -> str:
    """The commit that DVC keeps of a named experiment; nothing where there is none."""
    try:
        refs = git(root, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    except UserError:
        return ""
    return next((ref for ref in refs if name and ref.endswith(f"/{name}")), "")


def commit_named(root: Path, name: str) -> str:
    """The commit that git or DVC (its experiments) calls so; nothing where there is none."""
    revision = experiment_commit(root, name) or name
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except UserError:
        return ""
