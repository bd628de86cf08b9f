"""What a `dvc` process left: which stage ran, which DVC skipped, and the files that tell of the whole.

A stage that DVC skips or takes from its run cache runs no code. So when the process has ended, its
dvc.lock is read: it names what every stage is made of, and `conclude` says of each stage whether it ran
here, or which earlier run made what it has now.
"""

import csv
import functools
import io
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from compactgpt.lineage import (
    LOCK,
    MODEL,
    PARAMS,
    TOKENS,
    Cache,
    Chain,
    Entry,
    Place,
    checkout,
    entries_of,
    entry_key,
    md5_file,
    md5_of,
    outs,
    parse_yaml,
    read_chain,
)
from compactgpt.storage import MANIFEST
from compactgpt.tracking import flatten, grouped

MAX_TOTALS = 20_000_000  # bytes of one table of sums by document that is kept with a run
_DETAILS = ("eval/bounds/", "eval/model/", "eval/split/", "eval/text/")  # stay with the stage's own run
_HEADLINE = ("loss", "perplexity", "bits_per_byte")
LOCKED = "requirements.lock"


@dataclass(frozen=True)
class Child:
    """A stage's run in MLflow."""

    stage: str
    run_id: str
    status: str
    folder: Path  # its journal's

    @property
    def logged(self) -> Path:
        """Copies of what it logged."""
        return self.folder / "artifacts"


@dataclass
class Ending:
    """What is told of a `dvc` process."""

    status: str = "FINISHED"
    fates: list[tuple[str, str, str]] = field(default_factory=list)  # stage, what became of it, run id
    tags: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(
        default_factory=dict
    )  # run id of a stage -> the key of its entry in dvc.lock
    params: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # by step
    datasets: list[dict[str, str]] = field(default_factory=list)  # as Tracker.inputs takes them
    chain: Chain = field(default_factory=lambda: Chain([], {}))


def conclude(
    place: Place,
    cache: Cache,
    before: bytes | None,
    children: list[Child],
    find: Callable[[str], str],
) -> Ending:
    """Say what became of every stage, and gather the numbers of the whole.

    Args:
        place: the work tree.
        cache: DVC's.
        before: dvc.lock as the first stage found it; None where nobody looked.
        children: the stages that ran.
        find: gives the id of the run that an entry's key is a tag of, or nothing.
    """
    chain = read_chain(place)
    ran = {child.stage: child for child in children}
    ending = Ending(chain=chain)
    broken = next((stage for stage in chain.stages if stage in ran and ran[stage].status != "FINISHED"), "")
    if broken:
        ending.status = "KILLED" if ran[broken].status == "KILLED" else "FAILED"
    old = entries_of(before)
    for stage in chain.stages:
        entry, child = chain.entries.get(stage), ran.get(stage)
        if child:
            ending.fates.append((stage, f"ran ({child.status.lower()})", child.run_id))
            if entry and child.status == "FINISHED" and made(child, entry):
                ending.keys[child.run_id] = entry_key(entry)
        elif entry is None or (broken and chain.stages.index(stage) > chain.stages.index(broken)):
            ending.fates.append((stage, "not reached", ""))
        else:
            why = "unchanged" if before is None or old.get(stage) == entry else "from DVC's run cache"
            ending.fates.append((stage, f"skipped: {why}", find(entry_key(entry))))
    _add_facts(ending, place, cache)
    return ending


def made(child: Child, entry: Entry) -> bool:
    """Whether a run's reports are those that dvc.lock names: a kill of `dvc` may have come between."""
    logged = {path.name: md5_file(path) for path in (child.logged / "reports").glob("*")}
    named = {Path(path).name: md5 for path, md5 in outs(entry).items()}
    return all(named[name] == md5 for name, md5 in logged.items() if name in named)


def _add_facts(ending: Ending, place: Place, cache: Cache) -> None:
    """Hashes, parameters and figures of the whole chain as it stands."""
    chain, tags = ending.chain, ending.tags
    tags["lock_sha256"] = _sha256(chain.lock)
    tags["params_sha256"] = _sha256(place.read(PARAMS) or b"")
    tags["requirements_sha256"] = _sha256(place.read(LOCKED) or b"")
    for name, path, file in [("data", TOKENS, MANIFEST), ("weights", MODEL, MANIFEST)]:
        md5 = chain.out(path)
        if md5 and cache.has(md5) and (manifest := cache.files(md5).get(file)):
            content = manifest.read_bytes()
            files = json.loads(content)["files"]
            weights = files.get("model.safetensors", {}).get("sha256", "")
            tags[f"{name}_sha256"] = weights or _sha256(content)
            ending.datasets += token_files(files, {"train": "training", "val": "validation"})
    ending.params = flatten(parse_yaml(place.read(PARAMS), PARAMS))
    ending.metrics = list(_figures(chain, place, cache))


def token_files(files: Mapping[str, Any], contexts: Mapping[str, str]) -> list[dict[str, str]]:
    """The token files of a manifest, as `Tracker.inputs` takes data: what for, by split."""
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


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def read_out(chain: Chain, place: Place, cache: Cache, path: str) -> bytes | None:
    """An out's bytes, if they are those that dvc.lock names."""
    md5 = chain.out(path)
    if not md5:
        return None
    if cache.has(md5):
        return cache.file(md5).read_bytes()
    content = place.read(path)
    return content if content is not None and md5_of(content) == md5 else None


def _figures(chain: Chain, place: Place, cache: Cache) -> Iterator[tuple[int, dict[str, float]]]:
    """Figures of the chain under the names that stages use; of baselines, the headline."""
    if content := read_out(chain, place, cache, "reports/loss.csv"):
        for row in csv.DictReader(io.StringIO(content.decode())):
            curve = {"train/loss": row.get("train_loss"), "val/loss": row.get("val_loss")}
            yield int(row["step"]), {name: float(value) for name, value in curve.items() if value}
    if content := read_out(chain, place, cache, "reports/evaluation.json"):
        figures = grouped("evaluation", json.loads(content))
        yield 0, {key: value for key, value in figures.items() if not key.startswith(_DETAILS)}
    for stage in chain.stages:
        name = stage.removeprefix("baseline@")
        if name != stage and (content := read_out(chain, place, cache, f"reports/baseline/{name}.json")):
            figures = grouped("baseline", json.loads(content))
            found = [key for key in _HEADLINE if f"eval/{key}" in figures]
            yield 0, {f"eval/baselines/{name}.{key}": figures[f"eval/{key}"] for key in found}


@functools.cache
def packages() -> str:
    """Everything that is installed, a line a distribution."""
    found = {
        (one.name.lower().replace("_", "-"), one.version) for one in metadata.distributions() if one.name
    }
    return "".join(f"{name}=={version}\n" for name, version in sorted(found))


def write_files(place: Place, cache: Cache, target: Path) -> None:
    """Lay out what is kept with the run of the whole, as soon as `dvc` has ended: the next may change it.

    dvc.lock, params.yaml and dvc.yaml; reports, plots, page and samples; sums by document; the environment.
    Outs are only taken if they are those that dvc.lock names.
    """
    for name in (LOCK, PARAMS, "dvc.yaml", LOCKED):
        if (content := place.read(name)) is not None:
            (target / name).write_bytes(content)
    (target / "environment").mkdir()
    (target / "environment" / "packages.txt").write_text(packages())
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    (target / "environment" / "machine.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    chain = read_chain(place)
    for stage in chain.stages:
        for path, md5 in outs(chain.entries.get(stage, {})).items():
            if path.startswith("reports/") or _is_small_table(cache, path, md5):
                checkout(cache, place, path, md5, target / path)


def _is_small_table(cache: Cache, path: str, md5: str) -> bool:
    """Whether an out holds sums by document, and not too many."""
    if not path.startswith(("data/evaluation", "data/baseline")) or not cache.has(md5):
        return False
    return sum(file.stat().st_size for file in cache.files(md5).values()) <= MAX_TOTALS


def note(ending: Ending, link: Callable[[str], str], lines: Mapping[str, str]) -> str:
    """What MLflow shows on the page of the run, in Markdown.

    Args:
        ending: of the process.
        link: the address of a run in the UI.
        lines: further facts by name.
    """
    text = [*(f"- {name}: {value}" for name, value in lines.items()), "", "| stage | here | made by |"]
    text.append("| --- | --- | --- |")
    for stage, fate, run_id in ending.fates:
        made_by = f"[run {run_id[:8]}]({link(run_id)})" if run_id else "no run known here"
        text.append(f"| {stage} | {fate} | {'' if fate == 'not reached' else made_by} |")
    return "\n".join(text)
