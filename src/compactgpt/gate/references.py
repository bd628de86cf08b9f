"""What the gate compares with: the accepted reference in git, any commit, or the registry's champion.

A reference is a small JSON file, made by the machine and reviewed like code: figures, hashes, parameters,
and the sums of every document (of many, a sample by hash), so that every later comparison is paired.
"""

import csv
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compactgpt import config
from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotAllowed
from compactgpt.common.git import require_repository
from compactgpt.common.sections import Section
from compactgpt.common.storage import json_bytes, read_json, sha256_file, write_bytes
from compactgpt.evaluation.likelihood import read_totals
from compactgpt.gate import gate
from compactgpt.gate.gate import Documents, Point, Snapshot
from compactgpt.tracking.dvc_files import (
    MODEL,
    Cache,
    Commit,
    Folder,
    Place,
    commit_named,
    parse_yaml,
    read_chain,
)
from compactgpt.tracking.journal import flatten

ACCEPTED = Path("reports/accepted.json")
CHAMPION = "champion"
_DOCUMENTS = "data/evaluation"
_TOTALS = "compact.parquet"
_VERSION = 1
_SAME_SUM = 1e-9  # nats per token: the same numbers, added in another order
_STATISTICS = ("loop_rate", "seq_rep_4", "distinct_2")


class _Rows(Section):
    columns: tuple[str, ...]
    of: int
    rows: tuple[str, ...]


class _Hits(Section):
    items_sha256: str
    hits: Annotated[str, Field(pattern="^[01]+$")]


class _Record(Section):
    """The file that `accept` writes."""

    version: Literal[1]
    accepted: str
    baselines: dict[str, float]
    data: dict[str, str]
    documents: _Rows
    figures: dict[str, float]
    params: dict[str, Any]
    ruler: dict[str, Any]
    tasks: dict[str, _Hits]


def present(root: Path) -> Snapshot:
    """The project as it lies in a folder.

    Raises:
        MissingInput: a stage has not run.
        BadData: the report and the sums by document are not of one run.
    """
    return _take("these reports", Folder(root), root / _DOCUMENTS / _TOTALS)


def compare(against: str, root: Path, settings: config.Regression, bench: Path | None = None) -> gate.Verdict:
    """Judge the project as it lies in a folder against a reference.

    Args:
        against: see `reference`.
        root: of the project.
        settings: section `regression`.
        bench: a file that `benchmarks/training.py --json` wrote.
    """
    speed = None if bench is None else read_json(bench)
    try:
        if speed is not None:
            float(speed["engines"]["ours"]["ratio"])
    except (LookupError, TypeError, ValueError) as error:
        raise BadData(
            f"{bench} has no engines.ours.ratio: `benchmarks/training.py --json` writes it"
        ) from error
    return gate.judge(reference(against, root), present(root), settings, speed)


def reference(name: str, root: Path) -> Snapshot:
    """What to compare with.

    Args:
        name: a .json file that `accept` wrote, `champion`, or anything that git or DVC calls a revision.
        root: of the project.

    Raises:
        MissingInput: there is no such reference, or the cache lacks its sums by document.
        BadData: it is damaged.
        BadConfig: git knows no such revision.
    """
    if name.endswith(".json"):
        return accepted(root / name)
    if name == CHAMPION:
        return _champion(root)
    require_repository(root)
    if not (commit := commit_named(root, name)):
        raise BadConfig(f"--against {name}: no commit, branch, tag or experiment of that name")
    return _from_lock(f"{name} ({commit[:9]})", Commit(root, commit), root)


def _from_lock(name: str, place: Place, root: Path) -> Snapshot:
    """A state whose sums by document lie in DVC's cache, under the hash that its dvc.lock names."""
    md5 = read_chain(place).out(_DOCUMENTS)
    if not md5:
        raise MissingInput(f"{name} has no evaluation in its dvc.lock: choose a state after `dvc repro`")
    try:
        return _take(name, place, Cache(root).files(md5)[_TOTALS])
    except MissingInput as error:
        raise MissingInput(
            f"DVC's cache lacks the sums by document of {name}: `dvc fetch --all-commits evaluation` fetches "
            "them where a remote has them (docs/ci.md)"
        ) from error


def _champion(root: Path) -> Snapshot:
    """What MLflow keeps with the run that made the registered champion."""
    from compactgpt.tracking.registry import champion
    from compactgpt.tracking.store import open_store

    store = open_store(root)
    if not (found := champion(store)):
        raise MissingInput("no model is champion yet: `compactgpt gate --promote` makes the first")
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        store.client.download_artifacts(found["run_id"], "", scratch)
        place = Path(scratch)
        return _take(f"champion, version {found['version']}", Folder(place), place / _DOCUMENTS / _TOTALS)


def promote(root: Path, reason: str = "") -> str:
    """Register the model that the gate judged, and make it the champion.

    Args:
        root: of the project.
        reason: why a model of another configuration or val split is accepted.

    Returns:
        Its version.

    Raises:
        MissingInput: MLflow has no model with these weights.
        CheckFailed: configuration or val split are not the champion's, and there is no reason.
    """
    from compactgpt.tracking import registry
    from compactgpt.tracking.store import open_store, store_errors

    path = root / MODEL / "model.safetensors"
    if not path.exists():
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it")
    with store_errors("MLFLOW_TRACKING_URI"):
        return registry.promote(open_store(root), sha256_file(path), reason)


def _take(name: str, place: Place, totals: Path) -> Snapshot:
    try:
        return _snapshot(name, place, totals)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadData(
            f"{name}: a report is not what its stage writes ({error!r}): run `dvc repro` to make it anew"
        ) from error


def _snapshot(name: str, place: Place, totals: Path) -> Snapshot:
    def report(path: str) -> dict[str, Any]:
        content = place.read(path)
        if content is None:
            raise MissingInput(f"{name}: {path} is missing: run `dvc repro` to make it")
        return dict(json.loads(content))

    evaluation, training = report("reports/evaluation.json"), report("reports/training.json")
    tokenization = report("reports/tokenization.json")
    params = parse_yaml(place.read("params.yaml"), "params.yaml")
    return Snapshot(
        name,
        _ruler(evaluation),
        {
            "train": tokenization["train"]["sha256"],
            "tokenizer": tokenization["tokenizer"]["tokenizer_sha256"],
        },
        flatten(params),
        _figures(evaluation, training),
        {
            each: report(f"reports/baseline/{each}.json")["loss"]["value"]
            for each in params["baseline"]["names"]
        },
        {
            task: {key: found[key] for key in ("items_sha256", "hits")}
            for task, found in evaluation.get("tasks", {}).items()
            if "hits" in found
        },
        _documents(totals, evaluation),
        curve=_curve(place.read("reports/loss.csv")),
    )


def _curve(content: bytes | None) -> tuple[Point, ...]:
    """Read the loss curve, which is only shown: without it there is no chart."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    rows = csv.DictReader((content or b"").decode().splitlines())
    return tuple((int(row["step"]), number(row["train_loss"]), number(row["val_loss"])) for row in rows)


def _ruler(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    views = evaluation.get("views", {})
    sizes = {f"{view}.{key}": found[key] for view, found in views.items() for key in ("context", "stride")}
    return {"val": evaluation["validation"]["sha256"], "window": evaluation["window"], **sizes}


def _figures(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, float]:
    """Every figure that is compared or shown, by the name that the gate has for it."""
    figures = {"perplexity": evaluation["perplexity"]["value"]}
    for key in ("loss", "bits_per_byte", "word_perplexity"):
        if evaluation.get(key):
            figures[key] = evaluation[key]["value"]
    for view, found in evaluation.get("views", {}).items():
        figures[f"perplexity.{view}"] = found["perplexity"]["value"]
    for task, found in evaluation.get("tasks", {}).items():
        if "hits" in found:
            figures[f"accuracy.{task}"] = found["accuracy"]["value"]
    greedy = evaluation.get("text", {}).get("statistics", {}).get("greedy", {})
    figures |= {f"text.{key}": greedy[key]["value"] for key in _STATISTICS if key in greedy}
    return figures | {f"training.{key}": training[key] for key in ("train_loss", "val_loss")}


def _documents(path: Path, evaluation: Mapping[str, Any]) -> Documents:
    totals = read_totals(path)
    loss, reported = float(totals.nats.sum() / totals.tokens.sum()), evaluation["loss"]["value"]
    if abs(loss - reported) > _SAME_SUM:
        raise BadData(
            f"{path} makes a loss of {loss:.6f}, reports/evaluation.json has {reported:.6f}: they are of "
            "different runs; `dvc repro` or `dvc checkout` mends it"
        )
    nats = {"perplexity": totals.nats} | {f"perplexity.{view}": n for view, n in totals.views.items()}
    return Documents(tuple(totals.ids), totals.tokens.astype(float), nats)


def accept(snapshot: Snapshot, reason: str, path: Path, max_documents: int) -> None:
    """Write a state as the accepted reference.

    Args:
        snapshot: the state.
        reason: why it is accepted: stands in the file, and in every verdict against it.
        path: where.
        max_documents: of more, those with the smallest hashes are kept.

    Raises:
        BadConfig: no reason.
        NotAllowed: the file is no reference.
    """
    if not reason.strip():
        raise BadConfig("--accept wants a reason: what changed, and why these figures are right now")
    if path.exists() and not (path.suffix == ".json" and "accepted" in read_json(path)):
        raise NotAllowed(f"{path} is not an accepted reference, so it is not replaced: name another file")
    documents = _sample(snapshot.documents, max_documents)
    metrics = sorted(documents.nats)
    columns = [
        documents.tokens.astype(int).tolist(),
        *(documents.nats[metric].tolist() for metric in metrics),
    ]
    rows = [" ".join(map(str, row)) for row in zip(documents.ids, *columns, strict=True)]
    record = {
        "accepted": reason.strip(),
        "baselines": snapshot.baselines,
        "data": snapshot.data,
        "documents": {"columns": ["id", "tokens", *metrics], "of": len(snapshot.documents.ids), "rows": rows},
        "figures": snapshot.figures,
        "params": snapshot.params,
        "ruler": snapshot.ruler,
        "tasks": snapshot.tasks,
        "version": _VERSION,
    }
    write_bytes(path, json_bytes(record))


def _sample(documents: Documents, most: int) -> Documents:
    """All documents, or those with the smallest hashes: the ids themselves chose the split."""
    if len(documents.ids) <= most:
        return documents
    chosen = set(sorted(documents.ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:most])
    kept = documents.rows(tuple(name for name in documents.ids if name in chosen))
    assert kept is not None
    return kept


def accepted(path: Path) -> Snapshot:
    """Read the accepted reference.

    Raises:
        MissingInput: nothing was accepted yet.
        BadData: it is no reference of this version.
    """
    if not path.exists():
        raise MissingInput(f'{path} is missing: `compactgpt gate --accept "the first reference"` makes it')
    try:
        record = _Record.model_validate_json(path.read_bytes())
        held = record.documents
        rows = [row.split(" ") for row in held.rows]
        table = np.array([row[1:] for row in rows], np.float64)  # (documents, columns)
        columns = dict(zip(held.columns[1:], table.T, strict=True))
        tokens = columns.pop("tokens")
        if not np.isfinite(table).all() or not (tokens > 0).any():
            raise ValueError("a sum is not finite, or no document has a token")
        documents = Documents(tuple(row[0] for row in rows), tokens, columns, held.of)
        tasks = {task: hits.model_dump() for task, hits in record.tasks.items()}
        return Snapshot(
            str(path), record.ruler, record.data, record.params, record.figures,
            record.baselines, tasks, documents, record.accepted,
        )  # fmt: skip
    except (LookupError, ValueError) as error:
        raise BadData(
            f"{path} is no accepted reference ({error}): `git checkout {path}`, or make it anew with "
            '`compactgpt gate --accept "why"`'
        ) from error
