"""Read the versions that the gate compares: the present project and the reference.

The reference is a commit, the model with the alias `champion` in MLflow, or a file that
`compactgpt gate --accept` wrote.
"""

import hashlib
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotAllowed
from compactgpt.common.git import require_repository
from compactgpt.common.sections import Section
from compactgpt.common.storage import read_json, sha256_file, write_json
from compactgpt.config import Regression
from compactgpt.evaluation.totals import read_totals
from compactgpt.forecast.sweep import documents_sha256, read_sweep
from compactgpt.gate.gate import Documents, Noise, Snapshot, Verdict, run_gate
from compactgpt.reporting.schemas import Score, Tokenized, Trained, parse_report, read_curve
from compactgpt.tracking.dvc_files import (
    MODEL,
    Cache,
    Commit,
    Folder,
    Place,
    all_outs,
    commit_named,
    parse_yaml,
    read_entries,
)
from compactgpt.tracking.journal import flatten, tracking_store

SEEDS = "results/seeds.json"  # losses of training runs that differ only in their seeds
_DOCUMENTS = "data/evaluation"
_TOTALS = "compact.parquet"
# Fields of `Snapshot` that are copied to the file of an accepted reference without change.
_UNCHANGED = ("fingerprint", "data", "params", "figures", "baselines", "tasks")
_MAX_ROUNDING = 1e-9  # losses with a larger relative difference are from different runs
_STATISTICS = ("loop_rate", "seq_rep_4", "distinct_2")  # statistics of generated texts that the gate shows


class _Rows(Section):
    columns: tuple[str, ...]
    of: int  # number of documents in the complete val split
    rows: tuple[str, ...]  # for each document, the values of `columns` with spaces between them


class _Reference(Section):
    """The JSON file of an accepted reference. Most keys are fields of `Snapshot`."""

    model_config = ConfigDict(populate_by_name=True)
    version: Literal[1] = 1
    accepted: str  # why a person accepted this reference (`Snapshot.reason`)
    baselines: dict[str, float]
    data: dict[str, str]
    documents: _Rows
    figures: dict[str, float]
    params: dict[str, Any]
    # Existing files use the alias, an old word. scripts/vocabulary.py allows this word by `wording: quoted`.
    fingerprint: dict[str, Any] = Field(alias="ruler")  # wording: quoted
    tasks: dict[str, dict[str, str]]


def compare(against: str, root: Path, settings: Regression, bench: Path | None = None) -> Verdict:
    """Compare the project in the folder `root` with the reference `against`.

    `bench` is a file that `benchmarks/training.py --json` wrote; None skips the check of the training speed.
    """
    throughput = None
    if bench is not None:
        try:
            throughput = float(read_json(bench)["engines"]["ours"]["ratio"])
        except (LookupError, TypeError, ValueError) as error:
            advice = "write the file with `benchmarks/training.py --json`"
            raise BadData(
                f"{bench} has no engines.ours.ratio (our training speed over nanoGPT's): {advice}"
            ) from error
    then, now = read_reference(against, root), read_present(root)
    noise = read_noise(root / SEEDS, then, now, settings)
    curve = read_curve(root / "reports/loss.csv")
    return replace(run_gate(then, now, settings, noise, throughput), curve=curve)


def read_noise(path: Path, then: Snapshot, now: Snapshot, settings: Regression) -> Noise:
    """Return the noise between training runs, from the runs with different seeds in the file `path`.

    Returns `regression.fallback_noise` if `path` is missing, or if `path` has another val split or other
    settings than the compared versions `then` and `now`.
    """
    sweep, tokens = read_sweep(path), now.documents.tokens.astype(int).tolist()
    if sweep is None or len(sweep.runs) < 2:
        problem = "is missing or has fewer than 2 runs"
    elif sweep.documents is None or sweep.documents.ids_sha256 != documents_sha256(now.documents.ids, tokens):
        problem = "has losses on another val split than the compared versions"
    elif not any(sweep.settings.items() <= state.params.items() for state in (now, then)):
        problem = "has runs with other settings than the compared versions"
    else:
        losses = [run.loss for run in sweep.runs]
        deviation = statistics.stdev(losses)
        says = (
            f"the losses of {len(losses)} runs with different seeds have a standard deviation of "
            f"{deviation:.4f} nats per token ({SEEDS})"
        )
        return Noise(deviation, len(losses) - 1, says)
    assumed = settings.fallback_noise
    says = f"{SEEDS} {problem}: the gate assumes a noise of {assumed} nats per token"
    advice = "to measure the noise, run `compactgpt experiment run seeds`"
    return Noise(assumed, math.inf, f"{says} (regression.fallback_noise); {advice}")


def read_present(root: Path) -> Snapshot:
    """Read the present version of the project in the folder `root`."""
    return _read_version("these reports", Folder(root), root / _DOCUMENTS / _TOTALS)


def read_reference(name: str, root: Path) -> Snapshot:
    """Read the reference `name`: `champion`, a .json file, or a commit, branch, tag or DVC experiment.

    Raises BadConfig for an unknown name, MissingInput if the reference has no reports, and BadData if a
    file of the reference is damaged.
    """
    if name.endswith(".json"):
        return read_accepted(root / name)
    if name == "champion":
        return _read_champion(root)
    require_repository(root)
    if not (commit := commit_named(root, name)):
        raise BadConfig(f"--against {name}: git has no commit, branch, tag or DVC experiment of this name")
    version, label = Commit(root, commit), f"{name} ({commit[:9]})"
    if not (md5 := all_outs(read_entries(version)).get(_DOCUMENTS)):
        advice = "choose a commit that was made after `dvc repro`"
        raise MissingInput(f"{label} has no evaluation in its dvc.lock: {advice}")
    try:
        totals = Cache(root).files(md5)[_TOTALS]
    except MissingInput as error:
        advice = "if a remote has these losses, run `dvc fetch --all-commits evaluation` (docs/ci.md)"
        raise MissingInput(f"DVC's cache lacks the per-document losses of {label}: {advice}") from error
    return _read_version(label, version, totals)


def _read_champion(root: Path) -> Snapshot:
    from compactgpt.tracking.registry import PIPELINE_RUN, champion
    from compactgpt.tracking.store import open_store, store_errors

    store = open_store(root)
    with tempfile.TemporaryDirectory(prefix="compactgpt-") as scratch:
        with store_errors(tracking_store()["uri"]):
            if not (found := champion(store)):
                raise MissingInput("no model is champion in MLflow: make one by `compactgpt gate --promote`")
            store.client.download_artifacts(found.tags[PIPELINE_RUN], "", scratch)
        folder = Path(scratch)
        label = f"champion, version {found.version}"
        return _read_version(label, Folder(folder), folder / _DOCUMENTS / _TOTALS)


def _read_version(name: str, version: Place, totals: Path) -> Snapshot:
    """Read a version's reports and parameters, and its losses per document from the file `totals`.

    Raises MissingInput if a report is missing, and BadData if a file is damaged.
    """

    def report(path: str, schema: type[Any]) -> Any:
        content = version.read(path)
        if content is None:
            raise MissingInput(f"{name}: {path} is missing: run `dvc repro` in the repository folder")
        return parse_report(content, f"{name}: {path}", schema)

    evaluation: Score = report("reports/evaluation.json", Score)
    tokenized: Tokenized = report("reports/tokenization.json", Tokenized)
    params = parse_yaml(version.read("params.yaml"), "params.yaml")
    baselines = params.get("baseline", {}).get("names", [])
    fingerprint = {"val": evaluation.validation.sha256, "window": evaluation.window}
    for view, found in evaluation.views.items():
        fingerprint |= {f"{view}.context": found.context, f"{view}.stride": found.stride}
    return Snapshot(
        name,
        fingerprint,
        {"train": tokenized.train.sha256, "tokenizer": tokenized.tokenizer.tokenizer_sha256},
        flatten(params),
        _figures(evaluation, report("reports/training.json", Trained)),
        {each: report(f"reports/baseline/{each}.json", Score).loss.value for each in baselines},
        {
            task: {"items_sha256": found.items_sha256, "hits": found.hits}
            for task, found in evaluation.tasks.items()
            if found.hits
        },
        _read_documents(totals, evaluation.loss.value),
    )


def _figures(evaluation: Score, trained: Trained) -> dict[str, float]:
    greedy = evaluation.text.statistics.get("greedy", {})
    found = {
        "perplexity": evaluation.perplexity,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "word_perplexity": evaluation.word_perplexity,
        **{f"perplexity.{view}": one.perplexity for view, one in evaluation.views.items()},
        **{f"accuracy.{task}": one.accuracy for task, one in evaluation.tasks.items() if one.hits},
        **{f"text.{key}": greedy.get(key) for key in _STATISTICS},
    }
    figures = {name: interval.value for name, interval in found.items() if interval is not None}
    return figures | {"training.train_loss": trained.train_loss, "training.val_loss": trained.val_loss}


def _read_documents(path: Path, reported: float) -> Documents:
    totals = read_totals(path)
    loss = float(totals.nats.sum() / totals.tokens.sum())
    if not math.isclose(loss, reported, rel_tol=_MAX_ROUNDING):
        raise BadData(
            f"{path} gives a loss of {loss:.6f}, but reports/evaluation.json has {reported:.6f}: the files "
            "are from different runs; run `dvc repro` or `dvc checkout`"
        )
    nats = {"perplexity": totals.nats} | {f"perplexity.{view}": n for view, n in totals.views.items()}
    return Documents(tuple(totals.ids), totals.tokens.astype(float), nats, len(totals.ids))


def accept(snapshot: Snapshot, reason: str, path: Path, max_documents: int) -> None:
    """Write `snapshot` to `path` as the accepted reference, with at most `max_documents` documents.

    Raises BadConfig if `reason` is empty, and NotAllowed if `path` is a file that `accept` did not write.
    """
    if not reason.strip():
        raise BadConfig("--accept needs a reason: what changed, and why the new metrics are right")
    if path.exists() and not (path.suffix == ".json" and "accepted" in read_json(path)):
        raise NotAllowed(f"{path} is not an accepted reference, and was not replaced: name another file")
    ids = snapshot.documents.ids
    sample = set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:max_documents])
    documents = snapshot.documents.select(tuple(name for name in ids if name in sample))
    metrics = sorted(documents.nats)
    columns = [documents.tokens.astype(int).tolist(), *(documents.nats[key].tolist() for key in metrics)]
    rows = [" ".join(map(str, row)) for row in zip(documents.ids, *columns, strict=True)]
    reference = _Reference(
        accepted=reason.strip(),
        documents=_Rows(columns=("id", "tokens", *metrics), of=documents.of, rows=tuple(rows)),
        **{key: getattr(snapshot, key) for key in _UNCHANGED},
    )
    write_json(path, reference.model_dump(by_alias=True))


def read_accepted(path: Path) -> Snapshot:
    """Read a file that `accept` wrote. Raises MissingInput for a missing file, BadData for a damaged file."""
    if not path.exists():
        raise MissingInput(f'{path} is missing: run `compactgpt gate --accept "the first reference"`')
    try:
        reference = _Reference.model_validate_json(path.read_bytes())
        rows = [row.split(" ") for row in reference.documents.rows]
        table = np.array([row[1:] for row in rows], np.float64)  # (documents, columns after the id)
        columns = dict(zip(reference.documents.columns[1:], table.T, strict=True))
        tokens = columns.pop("tokens")
    except (LookupError, ValueError) as error:
        advice = f"restore the file with `git checkout {path}`"
        raise BadData(f"{path} is not a valid reference ({error}): {advice}") from error
    documents = Documents(tuple(row[0] for row in rows), tokens, columns, reference.documents.of)
    unchanged = {key: getattr(reference, key) for key in _UNCHANGED}
    return Snapshot(str(path), documents=documents, reason=reference.accepted, **unchanged)


def promote(root: Path, reason: str = "") -> str:
    """Make the model in models/ the champion of MLflow's registry, and return its version number there.

    Raises CheckFailed if the champion has another configuration than the model, and `reason` is empty.
    """
    from compactgpt.tracking import registry
    from compactgpt.tracking.store import open_store, store_errors

    path = root / MODEL / "model.safetensors"
    if not path.exists():
        raise MissingInput(f"{path} is missing: run `dvc repro` in the repository folder")
    with store_errors(tracking_store()["uri"]):
        return registry.promote(open_store(root), sha256_file(path), reason)
