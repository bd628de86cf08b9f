"""A version of the project by its name: an MLflow run, a revision of git, or the work tree as it is.

Whatever it is, a `Record` reads alike: files of the project, dvc.lock's chain, hashes, packages, machine.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadConfig, MissingInput
from compactgpt.common.git import DIFF, git_facts, require_repository, uncommitted
from compactgpt.tracking.dvc_files import (
    LOCK,
    Cache,
    Chain,
    Commit,
    Folder,
    Place,
    commit_named,
    read_chain,
)
from compactgpt.tracking.journal import LOCKED, machine_facts
from compactgpt.tracking.pipeline_run import packages

HERE = "workspace"
PACKAGES = "environment/packages.txt"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_HEX = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Record:
    """One version of the project."""

    name: str  # as people are told
    place: Place  # its files: params.yaml, dvc.lock, dvc.yaml, reports/
    chain: Chain
    commit: str = ""
    diff: bytes | None = b""  # None: there were changes, and nobody kept them
    stage: str = ""  # of a run of one stage; else the whole chain
    machine: dict[str, str] = field(default_factory=dict)  # as tracking.machine_facts
    packages: dict[str, str] = field(default_factory=dict)  # versions by name


def find(root: Path, wanted: str, scratch: Path) -> Record:
    """Find what a name means.

    Args:
        root: the repository.
        wanted: an MLflow run's id or the beginning of one, a revision of git or the name of a DVC experiment,
            or `workspace`.
        scratch: an empty folder, where the files of a run are laid out.

    Raises:
        BadConfig: nothing, or more than one run, has that name.
        MissingInput: the run keeps no dvc.lock.
    """
    if wanted == HERE:
        return _of_workspace(root)
    if _HEX.fullmatch(wanted) and (run := _run(root, wanted)):
        return _of_run(root, run, scratch)
    require_repository(root)
    if not (commit := commit_named(root, wanted)):
        raise BadConfig(
            f"{wanted!r} is no run of MLflow (`make ui` shows their ids), no revision of git, no experiment "
            f"of DVC, and not {HERE!r}"
        )
    place = Commit(root, commit)
    return Record(f"{wanted} ({commit[:9]})", place, read_chain(place), commit, packages=_locked(place))


def _run(root: Path, wanted: str) -> Any:
    """The one run whose id begins so, or None."""
    from compactgpt.tracking.store import open_store

    store = open_store(root)
    found, token = [], None
    while True:
        page = store.client.search_runs([store.experiment], max_results=1000, page_token=token)
        found += [run for run in page if run.info.run_id.startswith(wanted)]
        if not (token := page.token):
            break
    if len(found) > 1:
        raise BadConfig(f"{len(found)} runs begin with {wanted}: give more of the id")
    return found[0] if found else None


def _of_run(root: Path, run: Any, scratch: Path) -> Record:
    """A run of the pipeline, or of a stage: then its pipeline has the files."""
    from compactgpt.tracking.store import open_store

    tags = run.data.tags
    stage = "" if tags.get("stage") == "pipeline" else tags.get("stage", "")
    name = f"{stage or 'pipeline'} run {run.info.run_id[:8]}"
    whole = tags.get("mlflow.parentRunId", run.info.run_id) if stage else run.info.run_id
    open_store(root).client.download_artifacts(whole, "", str(scratch))
    place = Folder(scratch)
    if place.read(LOCK) is None:
        raise MissingInput(
            f"{name} keeps no dvc.lock: it was run by hand, or the `dvc` process that it is part of has not "
            "ended (`compactgpt sync` copies what is left)"
        )
    diff = place.read(DIFF) or b""
    return Record(
        name,
        place,
        read_chain(place),
        commit if _COMMIT.fullmatch(commit := tags.get("git.commit", "")) else "",  # else an option of git's
        None if tags.get("git.dirty") == "true" and not diff else diff,
        stage,
        {key: tags[key] for key in machine_facts() if key in tags} | _arithmetic(tags),
        versions((place.read(PACKAGES) or b"").decode()),
    )


def _arithmetic(tags: dict[str, str]) -> dict[str, str]:
    return {"arithmetic": tags["arithmetic"]} if "arithmetic" in tags else {}


def _of_workspace(root: Path) -> Record:
    if not (root / "dvc.yaml").exists():
        raise MissingInput("dvc.yaml is missing: run from the repository folder")
    place = Folder(root)
    commit = git_facts(root).get("git.commit", "")
    diff = uncommitted(root) if commit else b""
    return Record(HERE, place, read_chain(place), commit, diff, "", machine_facts(), versions(packages()))


def versions(lines: str) -> dict[str, str]:
    """Versions by name, of lines `name==version` or `name==version ; marker` that hold here; hashes aside."""
    from packaging.markers import Marker

    found = {}
    for line in lines.splitlines():
        pinned, _, marker = line.rstrip(" \\").partition(";")
        name, equals, version = pinned.strip().partition("==")
        if equals and (not marker or Marker(marker).evaluate()):
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def _locked(place: Place) -> dict[str, str]:
    """What a revision of git asks for: all that is known of its environment."""
    return versions((place.read(LOCKED) or b"").decode())


def read_table(record: Record, cache: Cache, path: str) -> bytes | None:
    """A table of sums by document: kept with a run, or in DVC's cache."""
    if (content := record.place.read(path)) is not None and not isinstance(record.place, Commit):
        return content
    for stage in record.chain.stages:
        for out in record.chain.entries.get(stage, {}).get("outs", []):
            inside = path == out["path"] or path.startswith(f"{out['path']}/")
            if inside and cache.has(md5 := str(out["md5"])):
                file = cache.files(md5).get(path[len(out["path"]) :].lstrip("/"))
                return file.read_bytes() if file else None
    return None
