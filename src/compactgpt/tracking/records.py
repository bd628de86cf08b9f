"""A version of the project by its name: an MLflow run, a revision of git, or the work tree as it is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.git import DIFF, git_facts, require_repository, uncommitted_changes
from compactgpt.tracking.dvc_files import LOCK, Chain, Commit, Folder, Place, commit_named, read_chain
from compactgpt.tracking.journal import LOCKED, machine_facts, packages

WORKSPACE = "workspace"
PACKAGES = "environment/packages.txt"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
Pair = tuple[Any, Any]  # values in two versions; None for a key that one lacks
_RUN_ID = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Version:
    """One version of the project, and what is known of the machine on which its stages ran."""

    name: str  # as it is printed
    place: Place  # its files: params.yaml, dvc.lock, dvc.yaml, reports/
    chain: Chain
    commit: str = ""
    diff: bytes | None = b""  # uncommitted changes; None if there were some that were not kept
    stage: str = ""  # of a run of one stage; empty for the whole pipeline
    machine: dict[str, str] = field(default_factory=dict)  # as `journal.machine_facts`
    packages: dict[str, str] = field(default_factory=dict)  # versions by name


def find_version(root: Path, wanted: str, scratch: Path) -> Version:
    """Find the version that a name stands for.

    Args:
        root: the repository.
        wanted: the id of an MLflow run or the beginning of one, a revision of git, the name of a DVC
            experiment, or `workspace`.
        scratch: an empty folder for the files of a run.

    Raises:
        BadConfig: no version, or more than one run, has that name.
        MissingInput: the run has no dvc.lock.
    """
    if wanted == WORKSPACE:
        return _workspace_version(root)
    if _RUN_ID.fullmatch(wanted) and (run := _find_run(root, wanted)):
        return _run_version(root, run, scratch)
    require_repository(root)
    if not (commit := commit_named(root, wanted)):
        raise BadConfig(
            f"{wanted!r} is not a run of MLflow (`make ui` shows their ids), a revision of git, an "
            f"experiment of DVC, or {WORKSPACE!r}"
        )
    place = Commit(root, commit)
    asked = parse_versions((place.read(LOCKED) or b"").decode())  # all that is known of its environment
    return Version(f"{wanted} ({commit[:9]})", place, read_chain(place), commit, packages=asked)


def _find_run(root: Path, wanted: str) -> Any:
    """Return the one run whose id begins so, or None."""
    from compactgpt.tracking.store import open_store

    store = open_store(root)
    found, token = [], None
    while True:
        page = store.client.search_runs([store.experiment], max_results=1000, page_token=token)
        found += [run for run in page if run.info.run_id.startswith(wanted)]
        if not (token := page.token):
            break
    if len(found) > 1:
        raise BadConfig(f"the ids of {len(found)} runs begin with {wanted}: give more of the id")
    return found[0] if found else None


def _run_version(root: Path, run: Any, scratch: Path) -> Version:
    """Return the version of a run. The files of a stage's run are those of its pipeline's run."""
    from compactgpt.tracking.store import open_store

    tags, run_id = run.data.tags, run.info.run_id
    stage = "" if tags.get("stage") == "pipeline" else tags.get("stage", "")
    name = f"{stage or 'pipeline'} run {run_id[:8]}"
    pipeline_id = tags.get("mlflow.parentRunId", run_id) if stage else run_id
    open_store(root).client.download_artifacts(pipeline_id, "", str(scratch))
    place = Folder(scratch)
    if place.read(LOCK) is None:
        raise MissingInput(
            f"{name} has no dvc.lock: it was run by hand, or the `dvc` process that it is part of has not "
            "ended (`compactgpt sync` copies what is left)"
        )
    commit, diff = tags.get("git.commit", ""), place.read(DIFF) or b""
    return Version(
        name,
        place,
        read_chain(place),
        commit if _COMMIT.fullmatch(commit) else "",  # anything else could be an option of git
        None if tags.get("git.dirty") == "true" and not diff else diff,
        stage,
        {key: tags[key] for key in {*machine_facts(), "arithmetic"} if key in tags},
        parse_versions((place.read(PACKAGES) or b"").decode()),
    )


def _workspace_version(root: Path) -> Version:
    if not (root / "dvc.yaml").exists():
        raise MissingInput("dvc.yaml is missing: run from the repository folder")
    place, commit = Folder(root), git_facts(root).get("git.commit", "")
    diff = uncommitted_changes(root).diff if commit else b""
    installed = parse_versions(packages())
    return Version(WORKSPACE, place, read_chain(place), commit, diff, "", machine_facts(), installed)


def parse_versions(requirements: str) -> dict[str, str]:
    """Return versions by name from lines `name==version` or `name==version ; marker` that hold here."""
    from packaging.markers import Marker

    found = {}
    for line in requirements.splitlines():
        pinned, _, marker = line.rstrip(" \\").partition(";")
        name, equals, version = pinned.strip().partition("==")
        if equals and (not marker or Marker(marker).evaluate()):
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the keys that have other values in two mappings."""
    return {key: (a.get(key), b.get(key)) for key in [*a, *(b.keys() - a.keys())] if a.get(key) != b.get(key)}


def changed_machine(a: Version, b: Version) -> dict[str, Pair]:
    """Return the facts that differ between two machines; none if one is not known."""
    return differing(a.machine, b.machine) if a.machine and b.machine else {}


def changed_packages(a: Version, b: Version) -> dict[str, Pair]:
    """Return the packages of other versions; none if those of one are not known.

    A revision only has requirements.lock: then the packages that both name are compared, and 2.13.0+cpu is
    a build of 2.13.0.
    """
    if not a.packages or not b.packages:
        return {}
    if not isinstance(a.place, Commit) and not isinstance(b.place, Commit):
        return differing(a.packages, b.packages)
    public = [{name: version.partition("+")[0] for name, version in one.packages.items()} for one in (a, b)]
    common = public[0].keys() & public[1].keys()
    return differing(*({name: one[name] for name in sorted(common)} for one in public))
