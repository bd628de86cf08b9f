"""Find a version of the project by name: an MLflow run, a git revision, or the current work tree."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.git import DIFF, git_facts, require_repository, uncommitted_changes
from compactgpt.tracking.dvc_files import LOCK, Chain, Commit, Folder, Place, commit_named, read_chain
from compactgpt.tracking.journal import LOCKED, machine_facts, packages, tracking_store

WORKSPACE = "workspace"
PACKAGES = "environment/packages.txt"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
Pair = tuple[Any, Any]  # one key's values in two versions; None if a version lacks the key
_RUN_ID = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Version:
    """One version of the project, and known facts of the machine on which its stages ran."""

    name: str  # for messages
    place: Place  # the version's files: params.yaml, dvc.lock, dvc.yaml, reports/
    chain: Chain
    commit: str = ""
    diff: bytes | None = b""  # uncommitted changes; None if the run did not save them
    stage: str = ""  # the stage, for a run of one stage; empty for the whole pipeline
    machine: dict[str, str] = field(default_factory=dict)  # from `journal.machine_facts`
    packages: dict[str, str] = field(default_factory=dict)  # package versions by name


def find_version(root: Path, wanted: str, scratch: Path) -> Version:
    """Return the version of the project with this name.

    Args:
        root: the repository.
        wanted: the id of an MLflow run or its first characters, a git revision, the name of a DVC experiment,
            or `workspace`.
        scratch: an empty folder, to which the files of an MLflow run are downloaded.

    Raises:
        BadConfig: no version has this name, or the ids of several runs begin with it.
        MissingInput: the run has no dvc.lock.
    """
    if wanted == WORKSPACE:
        return _workspace_version(root)
    if _RUN_ID.fullmatch(wanted):
        from compactgpt.tracking.store import open_store, store_errors

        with store_errors(tracking_store()["uri"]):
            store = open_store(root)
            if run := _find_run(store, wanted):
                return _run_version(store, run, scratch)
    require_repository(root)
    if not (commit := commit_named(root, wanted)):
        raise BadConfig(
            f"{wanted!r} is not a run of MLflow (`make ui` shows the run ids), a git revision, a DVC "
            f"experiment, or {WORKSPACE!r}"
        )
    place = Commit(root, commit)
    asked = parse_versions((place.read(LOCKED) or b"").decode())  # git has no list of installed packages
    return Version(f"{wanted} ({commit[:9]})", place, read_chain(place), commit, packages=asked)


def _find_run(store: Any, wanted: str) -> Any:
    """Return the MLflow run whose id begins with `wanted`; None if no id does."""
    found, token = [], None
    while True:
        page = store.client.search_runs([store.experiment], max_results=1000, page_token=token)
        found += [run for run in page if run.info.run_id.startswith(wanted)]
        if not (token := page.token):
            break
    if len(found) > 1:
        raise BadConfig(f"the ids of {len(found)} runs begin with {wanted}: type more characters of the id")
    return found[0] if found else None


def _run_version(store: Any, run: Any, scratch: Path) -> Version:
    """Return the version of an MLflow run. For a stage's run, use the files of its pipeline's run."""
    tags, run_id = run.data.tags, run.info.run_id
    stage = "" if tags.get("stage") == "pipeline" else tags.get("stage", "")
    name = f"{stage or 'pipeline'} run {run_id[:8]}"
    pipeline_id = tags.get("mlflow.parentRunId", run_id) if stage else run_id
    store.client.download_artifacts(pipeline_id, "", str(scratch))
    place = Folder(scratch)
    if place.read(LOCK) is None:
        raise MissingInput(
            f"{name} has no dvc.lock: the stage was run by hand, or its `dvc` process has not ended "
            "(after the end, `compactgpt sync` copies dvc.lock)"
        )
    commit, diff = tags.get("git.commit", ""), place.read(DIFF) or b""
    return Version(
        name,
        place,
        read_chain(place),
        commit if _COMMIT.fullmatch(commit) else "",  # git could read any other value as an option
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
    """Return package versions by name.

    Args:
        requirements: lines `name==version` or `name==version ; marker`. A line is skipped if its marker does
            not apply to this machine.
    """
    from packaging.markers import Marker

    found = {}
    for line in requirements.splitlines():
        pinned, _, marker = line.rstrip(" \\").partition(";")
        name, equals, version = pinned.strip().partition("==")
        if equals and (not marker or Marker(marker).evaluate()):
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    """Return both values of each key whose value differs between two mappings."""
    return {key: (a.get(key), b.get(key)) for key in [*a, *(b.keys() - a.keys())] if a.get(key) != b.get(key)}


def changed_machine(a: Version, b: Version) -> dict[str, Pair]:
    """Return the facts that differ between the machines of two versions; empty if a machine is unknown."""
    return differing(a.machine, b.machine) if a.machine and b.machine else {}


def changed_packages(a: Version, b: Version) -> dict[str, Pair]:
    """Return the packages whose versions differ; empty if the packages of a or b are unknown.

    A git revision has only requirements.lock, not the list of installed packages. Then only packages in both
    lists are compared, without the build label: 2.13.0+cpu equals 2.13.0.
    """
    if not a.packages or not b.packages:
        return {}
    if not isinstance(a.place, Commit) and not isinstance(b.place, Commit):
        return differing(a.packages, b.packages)
    public = [{name: version.partition("+")[0] for name, version in one.packages.items()} for one in (a, b)]
    common = public[0].keys() & public[1].keys()
    return differing(*({name: one[name] for name in sorted(common)} for one in public))
