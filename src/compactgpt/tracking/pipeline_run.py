"""The MLflow run of one `dvc` process: which stages ran, which DVC skipped, and the files that run it again.

A stage that DVC skips or takes from its run cache runs no code of ours. So `outcome` reads dvc.lock when the
`dvc` process has ended. A run has only what its own stages made, and what a skipped stage had made from the
very parameters, code and data of this run.
"""

import csv
import functools
import hashlib
import io
import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.git import DIFF, write_private
from compactgpt.common.storage import MANIFEST, read_json, write_json
from compactgpt.tracking.dvc_files import (
    CHAIN,
    LOCK,
    MODEL,
    PARAMS,
    TOKENS,
    Cache,
    Chain,
    Entry,
    Folder,
    Place,
    checkout,
    deps,
    entries_of,
    entry_key,
    entry_params,
    md5_file,
    md5_of,
    outs,
    parse_yaml,
    read_chain,
)
from compactgpt.tracking.journal import LOCKED, flatten, numbers

MAX_TOTALS = 20_000_000  # bytes of one table of sums by document that is kept with a run
RAN, SKIPPED, NOT_REACHED = "ran", "skipped", "not reached"
# Sections of params.yaml, what people tune first; the others change no model.
_SECTIONS = ("training", "model", "tokenization", "download", "evaluation", "baseline", "inspection",
             "validation", "runtime")  # fmt: skip
_MAX_DEPTH = 3  # deeper mappings, such as 30 versions of packages, are one parameter
_METRICS = re.compile(
    r"(?P<figure>loss|perplexity|bits_per_byte)\.value|tasks\.(?P<task>.+)\.accuracy\.value"
    r"|views\.(?P<view>.+)\.perplexity\.value|text\.statistics\.greedy\.(?P<text>loop_rate|seq_rep_4)\.value"
)


@dataclass(frozen=True)
class StageRun:
    """A stage that the `dvc` process ran."""

    stage: str
    status: str  # MLflow's: FINISHED, FAILED or KILLED
    folder: Path  # of its journal


def stage_metrics(stage: str, report: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a stage's report, grouped as MLflow's charts are: about ten, no sizes or counts.

    Args:
        stage: its full name, such as `baseline@xz`.
        report: what it wrote as JSON.
    """
    name, _, item = stage.partition("@")
    if name == "training":
        return {"val/best_loss": report["best_val_loss"]} if "best_val_loss" in report else {}
    group = {"evaluation": "eval", "baseline": f"baselines/{item}"}.get(name)
    found = {}
    for key, value in numbers(report).items() if group else ():
        if match := _METRICS.fullmatch(key):
            parts = match.groupdict()
            task, view = parts["task"], parts["view"]
            named = f"{task}_accuracy" if task else f"perplexity_{view}" if view else ""
            found[f"{group}/{named or parts['figure'] or parts['text']}"] = value
    return found


def tuned_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that MLflow gets, those that people tune first."""
    flat: dict[str, Any] = {}
    for section in (name for name in _SECTIONS if isinstance(tree.get(name), Mapping)):
        for key, value in flatten(tree[section], f"{section}.").items():
            head, rest = key.split(".")[:_MAX_DEPTH], key.split(".")[_MAX_DEPTH:]
            if rest:
                flat.setdefault(".".join(head), {})[".".join(rest)] = value
            else:
                flat[key] = value
    return {
        key: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
        for key, value in flat.items()
    }


def outcome(place: Place, before: Path, runs: list[StageRun]) -> dict[str, Any]:
    """Return what a `dvc` process did, from the files that it left.

    Args:
        place: the work tree, or the commit that DVC keeps of an experiment.
        before: the files that it started from.
        runs: the stages that it ran.

    Returns:
        `status` of the pipeline, `reason` where it is not known from the stages, and by stage what became of
        it: `[what, key of its entry in dvc.lock where that is valid]`.
    """
    try:
        chain, old = read_chain(place), entries_of(Folder(before).read(LOCK))
        params = parse_yaml(Folder(before).read(PARAMS) or place.read(PARAMS), PARAMS)
    except UserError as error:
        return {"status": "FAILED", "reason": str(error), "stages": {}}
    ran = {run.stage: run for run in runs}
    valid = _valid_stages(chain, params, ran, place)
    stages, reason = {}, ""
    for stage in chain.stages:
        entry = chain.entries.get(stage, {})
        if stage in ran:
            what = f"{RAN} ({ran[stage].status.lower()})"
            if ran[stage].status == "FINISHED" and stage not in valid:
                reason = f"dvc.lock has not what stage {stage} made: `dvc` failed or was killed after it"
        elif stage in valid:
            what = f"{SKIPPED}: {'unchanged' if old.get(stage) == entry else 'from the run cache of DVC'}"
        else:
            what = NOT_REACHED
        stages[stage] = [what, entry_key(entry) if stage in valid else ""]
    if not chain.lock:
        reason = f"{LOCK} is empty or missing"
    statuses = {run.status for run in runs}
    status = next(
        (one for one in ("KILLED", "FAILED") if one in statuses), "FAILED" if reason else "FINISHED"
    )
    return {"status": status, "reason": reason, "stages": stages}


def _valid_stages(
    chain: Chain, params: Mapping[str, Any], ran: Mapping[str, StageRun], place: Place
) -> set[str]:
    """Return the stages whose entry in dvc.lock belongs to this run: it made it, or would make the same."""
    makers = {path: stage for stage, entry in chain.entries.items() for path in outs(entry)}
    known: dict[str, bool] = {}

    def is_valid(stage: str) -> bool:
        if stage not in known:
            entry = chain.entries.get(stage)
            known[stage] = False  # while it is being looked at: a circle is never valid
            if entry is not None and stage in ran:
                known[stage] = ran[stage].status == "FINISHED" and _is_recorded(ran[stage], entry)
            elif entry is not None:
                known[stage] = _has_params(entry, params) and all(
                    is_current(path, md5) for path, md5 in deps(entry).items()
                )
        return known[stage]

    def is_current(path: str, md5: str) -> bool:
        inside = [out for out in makers if f"{out}/".startswith(f"{path}/") or path.startswith(f"{out}/")]
        if inside:
            same = all(chain.out(out) == md5 for out in inside if out == path)
            return same and all(is_valid(makers[out]) for out in inside)
        content = place.read(path)  # a file of code; folders are hashed by DVC only
        return content is None or md5_of(content) == md5

    return {stage for stage in chain.stages if is_valid(stage)}


def _is_recorded(run: StageRun, entry: Entry) -> bool:
    """Whether dvc.lock names the very reports that a stage logged."""
    logged = {path.name: md5_file(path) for path in (run.folder / "artifacts/reports").glob("*")}
    named = {Path(path).name: md5 for path, md5 in outs(entry).items()}
    return all(named[name] == md5 for name, md5 in logged.items() if name in named)


def _has_params(entry: Entry, params: Mapping[str, Any]) -> bool:
    """Whether a stage's entry was made with these parameters."""
    for key, value in entry_params(entry).items():
        found: Any = params
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found != value:
            return False
    return True


def keep_files(place: Place, cache: Cache, before: Path, found: Mapping[str, Any], target: Path) -> None:
    """Write what is kept with the run as soon as `dvc` has ended: the next command may change it.

    dvc.lock as it is left; params.yaml, dvc.yaml, requirements.lock and uncommitted changes as they were
    at the start; the environment; reports and small tables of sums by document of stages that are valid.
    """
    for name, source in [(LOCK, place), *((name, Folder(before)) for name in (PARAMS, CHAIN, LOCKED))]:
        if (content := source.read(name)) is not None:
            (target / name).write_bytes(content)
    if (before / DIFF).exists():
        write_private(target / DIFF, (before / DIFF).read_bytes())
    (target / "environment").mkdir()
    (target / "environment/packages.txt").write_text(packages())
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    write_json(target / "environment/machine.json", facts)
    chain = kept_chain(place, found)
    for stage in valid_stages(found):
        for path, md5 in outs(chain.entries[stage]).items():
            if path.startswith("reports/") or _is_small_table(cache, path, md5):
                checkout(cache, place, path, md5, target / path)


def kept_chain(place: Place, found: Mapping[str, Any]) -> Chain:
    """Return the stages and entries of a run; none where its dvc.lock can't be read."""
    return read_chain(place) if found["stages"] else Chain([], {})


def valid_stages(found: Mapping[str, Any]) -> list[str]:
    """Return the stages whose entry in dvc.lock belongs to the run."""
    return [stage for stage, (_, key) in found["stages"].items() if key]


def _is_small_table(cache: Cache, path: str, md5: str) -> bool:
    """Whether an out holds sums by document, and not too many."""
    if not path.startswith(("data/evaluation", "data/baseline")) or not cache.has(md5):
        return False
    return sum(file.stat().st_size for file in cache.files(md5).values()) <= MAX_TOTALS


@functools.cache
def packages() -> str:
    """Return everything that is installed, a line a distribution."""
    found = {
        (one.name.lower().replace("_", "-"), one.version) for one in metadata.distributions() if one.name
    }
    return "".join(f"{name}=={version}\n" for name, version in sorted(found))


def skipped_metrics(after: Path, found: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of the valid stages that DVC skipped, from their reports."""
    for stage in valid_stages(found):
        name, _, item = stage.partition("@")
        path = after / "reports" / (f"baseline/{item}.json" if item else f"{name}.json")
        if found["stages"][stage][0].startswith(SKIPPED) and path.exists():
            yield 0, stage_metrics(stage, read_json(path))
            curve = after / "reports/loss.csv"
            if name == "training" and curve.exists():
                for row in csv.DictReader(io.StringIO(curve.read_text(encoding="utf-8"))):
                    losses = {"train/loss": row.get("train_loss"), "val/loss": row.get("val_loss")}
                    yield int(row["step"]), {key: float(value) for key, value in losses.items() if value}


def hashes(
    after: Path, chain: Chain, cache: Cache, found: Mapping[str, Any]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return hashes of what a run is made of, as tags, and its token files as `Tracker.inputs` takes them."""
    tags = {
        f"{key}_sha256": hashlib.sha256(Folder(after).read(name) or b"").hexdigest()
        for key, name in (("lock", LOCK), ("params", PARAMS), ("requirements", LOCKED))
    }
    datasets = []
    made = {path: md5 for stage in valid_stages(found) for path, md5 in outs(chain.entries[stage]).items()}
    for key, path in (("data", TOKENS), ("weights", MODEL)):
        md5 = made.get(path, "")
        if md5 and cache.has(md5) and (manifest := cache.files(md5).get(MANIFEST)):
            files = read_json(manifest)["files"]
            weights = files.get("model.safetensors", {}).get("sha256", "")
            tags[f"{key}_sha256"] = weights or hashlib.sha256(manifest.read_bytes()).hexdigest()
            datasets += token_files(files, {"train": "training", "val": "validation"})
    return tags, datasets


def token_files(files: Mapping[str, Any], contexts: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the token files of a manifest as `Tracker.inputs` takes them.

    Args:
        files: of the manifest, by name.
        contexts: what each split is used for, in MLflow's words.
    """
    return [
        {
            "name": name,
            "digest": files[name]["sha256"],
            "bytes": str(files[name]["bytes"]),
            "source": f"{TOKENS}/{name}",
            "context": context,
        }
        for split, context in contexts.items()
        if (name := f"{split}.tokens") in files
    ]


def description(command: str, found: Mapping[str, Any], links: Mapping[str, str]) -> str:
    """Return the description of a pipeline run, in Markdown.

    Args:
        command: that a user can give.
        found: the outcome.
        links: Markdown link to the run that made a stage's outputs, by stage.
    """
    lines = [f"`{command}`", "", *([f"**{found['reason']}**", ""] if found["reason"] else [])]
    lines += ["| stage | here | made by |", "| --- | --- | --- |"]
    for stage, (what, _) in found["stages"].items():
        made_by = "" if what == NOT_REACHED else links.get(stage) or "no run known here"
        lines.append(f"| {stage} | {what} | {made_by} |")
    return "\n".join(lines)


def write_after(place: Place, cache: Cache, run_folder: Path, runs: list[StageRun]) -> None:
    """Keep outcome and files of a `dvc` process that has ended, in `outcome.json` and `after/`."""
    found, making = outcome(place, run_folder / "before", runs), run_folder / "after.tmp"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        keep_files(place, cache, run_folder / "before", found, making)
    except UserError as error:  # an object of the cache was altered
        found["reason"] = found["reason"] or str(error)
    write_json(run_folder / "outcome.json", found)
    making.rename(run_folder / "after")
