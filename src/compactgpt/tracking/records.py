"""Find a version of the project: an MLflow run, a git revision, or the work tree."""

import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.git import DIFF, git_facts, require_repository, uncommitted_changes
from compactgpt.tracking.dvc_files import (
    LOCK,
    STAGES,
    Commit,
    Entry,
    Folder,
    Place,
    commit_named,
    read_entries,
)
from compactgpt.tracking.journal import LOCKED, machine_facts, packages, tracking_store

WORKSPACE = "workspace"  # the name that users give for the current work tree
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_RUN_ID = re.compile(r"[0-9a-f]{4,32}")
Pair = tuple[Any, Any]  # (value in version A, value in version B); None stands for a missing value


@dataclass(frozen=True)
class Version:
    """A version of the project's files, with its machine and its packages if they are known."""

    name: str  # the version's name in messages to the user
    place: Place  # the folder or commit with params.yaml, dvc.lock, dvc.yaml and reports/
    commit: str = ""  # the full hash of the commit; empty if unknown
    diff: bytes | None = b""  # the uncommitted changes; None if they exist but were not saved
    machine: dict[str, str] = field(default_factory=dict)  # the result of `machine_facts`; empty if unknown
    packages: dict[str, str] = field(default_factory=dict)  # package name -> version; empty if unknown

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entry of each stage in this version's dvc.lock."""
        return read_entries(self.place)


def find_version(root: Path, wanted: str, scratch: Path) -> Version:
    """Return the version named `wanted`: an MLflow run id, git revision, DVC experiment or `workspace`.

    Downloads the files of a run into `scratch`. Raises BadConfig for an unknown or ambiguous name.
    """
    if wanted == WORKSPACE:
        if not (root / STAGES).exists():
            raise MissingInput("dvc.yaml is missing: run from the repository folder")
        commit = git_facts(root).get("git.commit", "")
        return version_here(WORKSPACE, root, commit, uncommitted_changes(root)[0] if commit else b"")
    if _RUN_ID.fullmatch(wanted) and (version := _find_run(root, wanted, scratch)):
        return version
    require_repository(root)
    if not (commit := commit_named(root, wanted)):
        raise BadConfig(
            f"{wanted!r} is not a run of MLflow (`make ui` shows the run ids), a git revision, a DVC "
            f"experiment, or {WORKSPACE!r}"
        )
    place = Commit(root, commit)
    # Use the versions in requirements.lock, because a commit has no list of installed packages.
    pinned = parse_versions((place.read(LOCKED) or b"").decode())
    return Version(f"{wanted} ({commit[:9]})", place, commit, packages=pinned)


def version_here(name: str, root: Path, commit: str = "", diff: bytes = b"") -> Version:
    """Return the version in the folder `root`, with facts about this machine and its packages."""
    return Version(name, Folder(root), commit, diff, machine_facts(), parse_versions(packages()))


def _find_run(root: Path, wanted: str, scratch: Path) -> Version | None:
    """Return the version of the MLflow run whose id begins with `wanted`, or None if there is no such run."""
    from compactgpt.tracking.store import open_store, store_errors

    with store_errors(tracking_store()["uri"]):
        store = open_store(root)
        runs = store.client.search_runs([store.experiment], f"attributes.run_id LIKE '{wanted}%'")
        if not runs:
            return None
        if len(runs) > 1:
            raise BadConfig(f"the ids of {len(runs)} runs begin with {wanted}: type more of its characters")
        tags, run_id = runs[0].data.tags, runs[0].info.run_id
        folder = tempfile.mkdtemp(dir=scratch)
        # The parent of a stage's run is the pipeline's run. Only the parent has files such as dvc.lock.
        store.client.download_artifacts(tags.get("mlflow.parentRunId", run_id), "", folder)
    name, place = f"{tags.get('stage', 'pipeline')} run {run_id[:8]}", Folder(Path(folder))
    if place.read(LOCK) is None:
        raise MissingInput(
            f"{name} has no dvc.lock: the stage was run without `dvc`, or `dvc` has not ended (then wait, "
            "and run `compactgpt sync`)"
        )
    commit, diff = tags.get("git.commit", ""), place.read(DIFF) or b""
    return Version(
        name,
        place,
        commit if _COMMIT.fullmatch(commit) else "",  # git could take a text such as `-x` for an option
        None if tags.get("git.dirty") == "true" and not diff else diff,
        {key: tags[key] for key in {*machine_facts(), "arithmetic"} if key in tags},
        parse_versions((place.read("environment/packages.txt") or b"").decode()),
    )


def parse_versions(requirements: str) -> dict[str, str]:
    """Return package name -> version from the text of a requirements file.

    Packages for other platforms are left out. Version 2.13.0+cpu becomes 2.13.0.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    for line in requirements.splitlines():
        with suppress(InvalidRequirement):  # skip a line that names no package
            package = Requirement(line.rstrip(" \\"))
            if package.marker is None or package.marker.evaluate():
                version = str(package.specifier).removeprefix("==")
                found[canonicalize_name(package.name)] = version.partition("+")[0]
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the keys with different values: key -> (value in `a`, value in `b`)."""
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def changed_environment(a: Version, b: Version) -> dict[str, Pair]:
    """Return the packages and machine facts that differ: name -> (value in `a`, value in `b`).

    Left out: a package that only one version has, and machine facts if one version has none.
    """
    pairs = differing(a.packages, b.packages)
    packages = {name: pairs[name] for name in sorted(pairs) if None not in pairs[name]}
    return packages | (differing(a.machine, b.machine) if a.machine and b.machine else {})
