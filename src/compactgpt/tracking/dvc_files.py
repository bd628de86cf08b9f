"""Read dvc.yaml, dvc.lock, params.yaml, and DVC's cache.

Only functions that need DVC import it, because the import takes half a second.
"""

import configparser
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, MissingInput, OutsideFolder, UserError
from compactgpt.common.git import git_text, run_git
from compactgpt.common.sections import YAML_ERRORS, find_conflict
from compactgpt.common.storage import inside, json_bytes, write_bytes

LOCK, PARAMS, STAGES = "dvc.lock", "params.yaml", "dvc.yaml"
MODEL, TOKENS, TOKENIZER = "models/compact", "data/tokens", "data/tokenizer"
CODE = ("src/", "stages/")  # the folders of the project's code
Entry = dict[str, Any]  # what dvc.lock has for one stage: the command, deps, params and outs
_LOCK_COPY = Path(".dvc/tmp/compactgpt/dvc.lock")  # the copy of dvc.lock that `keep_lock` writes
# The name of a file or folder in DVC's cache: the MD5 of its content.
_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
_RESTORE_LOCK = f"{LOCK} is not as DVC writes it: `git checkout {LOCK}` restores it"
# Byte code of Python and temporary files of editors, as in .dvcignore.
_IGNORED = re.compile(r"__pycache__|.*\.(pyc|egg-info)|\..*\.sw.|.*~|#.*#|\.#.*|4913|\.DS_Store")


@dataclass(frozen=True)
class Folder:
    """A folder with the files of a project, such as the work tree."""

    root: Path

    def read(self, path: str) -> bytes | None:
        """Return the content of the file `path`, or None for a missing file."""
        try:
            return inside(self.root, path, follow=False).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


@dataclass(frozen=True)
class Commit:
    """A git commit with the files of a project."""

    root: Path  # the folder of the repository
    revision: str  # the hash or the name of the commit

    def read(self, path: str) -> bytes | None:
        """Return the content of the file `path`, or None for a missing file."""
        with suppress(UserError):
            return run_git(self.root, "show", f"{self.revision}:{path}")
        return None


Place = Folder | Commit


def commit_named(root: Path, name: str) -> str:
    """Return the commit hash of a git revision or DVC experiment; empty for an unknown name."""
    # DVC names the commit of an experiment refs/exps/<2 digits>/<38 digits>/<experiment>.
    refs = git_text(root, "for-each-ref", "--format=%(refname)", f"refs/exps/**/{name}").split()
    revision = f"{(refs or [name])[0]}^{{commit}}"
    with suppress(UserError):
        return git_text(root, "rev-parse", "--verify", "--quiet", "--end-of-options", revision)
    return ""


def parse_yaml(content: bytes | None, name: str) -> dict[str, Any]:
    """Parse the content of dvc.yaml, dvc.lock or params.yaml. Return {} for a missing file (None).

    `name` is the file's name for messages. Raises BadData if the file is not a YAML mapping.
    """
    from ruamel.yaml import YAML

    content = content or b"{}"
    try:
        return {**(YAML(typ="safe").load(content.decode()) or {})}
    except YAML_ERRORS as error:
        advice = f"{name} is not a valid YAML mapping: `git checkout {name}` restores it"
        raise BadData(find_conflict(name, content) or advice) from error


def entries_of(lock: bytes | None) -> dict[str, Entry]:
    """Return the entry of each stage in dvc.lock, whose content is `lock`.

    Raises BadData for invalid content, and OutsideFolder for a path outside the project.
    """
    stages: dict[str, Entry] = parse_yaml(lock, LOCK).get("stages", {})
    try:
        for entry in stages.values():
            for path in {**outs(entry), **deps(entry)}:
                inside(Path(), path, follow=False)
            entry_params(entry)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadData(_RESTORE_LOCK) from error
    return stages


def read_entries(place: Place) -> dict[str, Entry]:
    """Return a dict: stage -> its entry in dvc.lock, in the order of dvc.yaml.

    A stage without an entry is left out. Raises BadData if dvc.yaml or dvc.lock is not valid.
    """
    stages, entries = read_stages(place), entries_of(place.read(LOCK))
    # DVC keeps deleted stages in dvc.lock (treeverse/dvc#5293), so only stages of dvc.yaml are used.
    return {stage: entries[stage] for stage in stages or entries if stage in entries}


def read_stages(place: Place) -> dict[str, Any]:
    """Return each stage of dvc.yaml: name -> YAML mapping.

    A matrix gives several stages, such as `baseline@xz`.
    Raises BadData for invalid YAML files.
    """
    params = parse_yaml(place.read(PARAMS), PARAMS)
    try:
        return dict(_expand(parse_yaml(place.read(STAGES), STAGES).get("stages", {}), params))
    except (AttributeError, TypeError, ValueError) as error:
        raise BadData(f"{STAGES} has an invalid stage: `git checkout {STAGES}` restores the file") from error


def _expand(bodies: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, body in bodies.items():
        if "matrix" not in body:
            yield name, body
            continue
        ((variable, items),) = body["matrix"].items()
        if isinstance(items, str):  # a reference to params.yaml, such as `${baseline.names}`
            items = value_at(params, items.strip("${}"))
        # Return no stages for a value that is no list: the check of params.yaml reports this error.
        for item in items if isinstance(items, list) else []:
            quoted = json.dumps(str(item))[1:-1]
            yield f"{name}@{item}", json.loads(json.dumps(body).replace(f"${{item.{variable}}}", quoted))


def value_at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key, or None if the key is missing."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def overlap(path: str, other: str) -> bool:
    """Return whether two paths are equal or one contains the other."""
    return f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")


def keep_lock(root: Path) -> None:
    """Save a copy of dvc.lock for `restore_lock`, because a killed DVC can leave dvc.lock incomplete."""
    if (root / LOCK).is_file():
        write_bytes(root / _LOCK_COPY, (root / LOCK).read_bytes())


def restore_lock(root: Path) -> bool:
    """Replace an incomplete dvc.lock by the copy from `keep_lock`. Return whether dvc.lock was replaced.

    Raises BadData for merge conflicts, or if there is no complete copy.
    """
    lock, copy = root / LOCK, root / _LOCK_COPY
    if not lock.exists() or _is_complete(lock.read_bytes()):
        return False
    if conflict := find_conflict(LOCK, lock.read_bytes()):
        raise BadData(conflict)
    if not (copy.exists() and _is_complete(copy.read_bytes())):
        raise BadData(_RESTORE_LOCK)
    write_bytes(lock, copy.read_bytes())
    return True


def _is_complete(lock: bytes) -> bool:
    with suppress(BadData):
        entries_of(lock)
        return "schema" in parse_yaml(lock, LOCK)  # an empty dvc.lock lacks this key
    return False


def entry_key(entry: Entry) -> str:
    """Return the SHA-256 of a stage's entry in dvc.lock: of its command, parameters and hashes."""
    content = json.dumps(entry, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def outs(entry: Entry) -> dict[str, str]:
    """Return path -> MD5 for the outputs of a stage. The MD5 of a folder ends in `.dir`."""
    return {out["path"]: out["md5"] for out in entry.get("outs", [])}


def all_outs(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return path -> MD5 for the outputs of all stages."""
    return {path: md5 for entry in entries.values() for path, md5 in outs(entry).items()}


def deps(entry: Entry) -> dict[str, str]:
    """Return path -> MD5 for the dependencies of a stage. The MD5 of a folder ends in `.dir`."""
    return {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}


def entry_params(entry: Entry) -> dict[str, Any]:
    """Return the parameters in a stage's entry in dvc.lock, by dotted key."""
    return dict(entry.get("params", {}).get(PARAMS, {}))


def params_sha256(params: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a stage's parameters."""
    return hashlib.sha256(json_bytes(params)).hexdigest()


def md5_of(content: bytes) -> str:
    """Return the MD5 of `content`, as DVC computes it."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def md5_file(path: Path) -> str:
    """Return the MD5 of a file, without reading the whole file into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def md5_path(path: Path) -> str:
    """Return the MD5 of a file or folder, as DVC computes the MD5; empty for a missing path."""
    if path.is_file():
        return md5_file(path)
    if not path.is_dir():
        return ""
    files = {
        found.relative_to(path).as_posix(): found
        for found in path.rglob("*")
        if found.is_file() and not any(map(is_ignored, found.relative_to(path).parts))
    }
    listing = [{"md5": md5_file(files[name]), "relpath": name} for name in sorted(files)]
    return md5_of(json.dumps(listing, sort_keys=True).encode()) + ".dir"


def is_ignored(name: str) -> bool:
    """Return whether .dvcignore excludes a file or folder with this name from a dependency."""
    return bool(_IGNORED.fullmatch(name))


def ignored_files(root: Path) -> Callable[[str], bool]:
    """Return a function: whether DVC ignores a file, as the .dvcignore files in the project `root` say.

    The function takes the path of the file, relative to `root`.
    """
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    folder = str(root.absolute())
    rules = DvcIgnoreFilter(localfs, folder)
    return lambda name: bool(rules.is_ignored_file(f"{folder}/{name}"))


class Cache:
    """DVC's cache on this machine, in which the name of each file is the MD5 of its content."""

    def __init__(self, root: Path) -> None:
        settings = configparser.ConfigParser(interpolation=None)
        settings.read([root / ".dvc/config", root / ".dvc/config.local"])
        folder = settings.get("cache", "dir", fallback="cache").strip()
        self.folder = (root / ".dvc" / folder).resolve()

    def files(self, md5: str) -> dict[str, Path]:
        """Return the files of an output: path relative to the output -> path in the cache.

        An output that is a single file has the relative path "".
        Raises MissingInput if the cache lacks a file, and OutsideFolder for an invalid hash or path.
        """
        if not md5.endswith(".dir"):
            return {"": self._object(md5)}
        listing = json.loads(self._object(md5).read_bytes())
        for item in listing:
            inside(self.folder, item["relpath"], follow=False)
        return {item["relpath"]: self._object(item["md5"]) for item in listing}

    def has(self, md5: str) -> bool:
        """Return whether the cache has all files of the output with this MD5."""
        try:
            self.files(md5)
        except (MissingInput, ValueError):
            return False
        return True

    def _object(self, md5: str) -> Path:
        if not _OBJECT.fullmatch(md5):  # `../x` would lead out of the cache
            raise OutsideFolder(
                f"{LOCK} names {md5!r}, not a hash of DVC's cache: `git checkout {LOCK}` restores {LOCK}"
            )
        path = self.folder / "files" / "md5" / md5[:2] / md5[2:]
        if not path.is_file():
            raise MissingInput(f"DVC's cache lacks {md5}: `dvc pull` downloads it if a remote has it")
        return path


def checkout(cache: Cache, place: Place, path: str, md5: str, target: Path) -> bool:
    """Copy the output `path` with this MD5 from DVC's cache, or else from `place`, to `target`.

    Returns False if neither has the output. Raises BadData if a file in the cache was altered.
    """
    if not cache.has(md5):
        content = place.read(path)
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
            raise BadData(f"{source} was altered: run `dvc repro -f` or `dvc pull` to restore it")
    return True


@contextmanager
def open_repo(root: Path) -> Iterator[Any]:
    """Open a folder as a DVC repository without git, for a `with` block.

    Raises BadData if DVC can't read dvc.yaml or dvc.lock.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
            # DVC trusts the hashes saved in `site_cache_dir`. An empty folder makes DVC read every file.
            settings = {"core": {"no_scm": True, "site_cache_dir": scratch}}
            with Repo(str(root), config=settings) as repo:
                yield repo
    except (DvcException, ImportError) as error:  # ImportError: for example, dvc-s3 is missing
        raise BadData(f"DVC can't read {STAGES} or {LOCK} in {root}: {error}") from error


def pipeline_stages(repo: Any) -> list[Any]:
    """Return the stages of dvc.yaml.

    For DVC, each .dvc file, such as corpus/input.txt.dvc, is a stage, too. These stages are left out,
    because they have no command.
    """
    return [stage for stage in repo.index.stages if stage.cmd]


def stages_before(root: Path, name: str) -> list[str]:
    """Return the stages on which the stage `name` depends, in the order in which DVC runs them."""
    from dvc.repo.reproduce import plan_repro

    with open_repo(root) as repo:
        wanted = [stage for stage in pipeline_stages(repo) if stage.name == name]
        plan = [stage.name for stage in plan_repro(repo.index.graph, wanted) if stage.cmd]
        return [stage for stage in plan if stage != name]
