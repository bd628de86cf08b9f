"""What the other stages leave for the comparison, small and made up: shared by the tests of its readers."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from typer.testing import CliRunner

from compactgpt.config import load_params
from compactgpt.evaluation.likelihood import IN_WINDOW
from compactgpt.forecast.estimate import estimate
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.schemas import read_sources
from stages.comparison import app

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
LIKELIHOOD = PARAMS.evaluation.likelihood
NAMES = PARAMS.baseline.names
DOCUMENTS = 40
TOKENS = np.random.default_rng(0).integers(20, 200, DOCUMENTS)
SPLIT = {"documents": DOCUMENTS, "tokens": int(TOKENS.sum()), "bytes": int(TOKENS.sum()) * 4}
DIFFICULTY = np.random.default_rng(1).normal(0, 0.5, DOCUMENTS)
LOSSES = {"compact": 4.4, **{name: 3.0 + 0.7 * place for place, name in enumerate(NAMES)}}


def nats_of(name: str) -> np.ndarray:
    noise = np.random.default_rng(list(LOSSES).index(name)).normal(0, 0.05, DOCUMENTS)
    return TOKENS * (LOSSES[name] + DIFFICULTY + noise)


def write_score(reports: Path, data: Path, name: str) -> None:
    nats, bytes_ = nats_of(name), TOKENS * 4
    loss = nats.sum() / TOKENS.sum()
    bits = nats.sum() / (math.log(2) * bytes_.sum())
    is_neural = name == "compact" or PARAMS.baseline.specs[name].kind in ("gguf", "hub", "folder")
    model = {"kind": "test", "context": IN_WINDOW if is_neural else "c"}
    model |= {"num_params": None if name == "xz" else 1_234_567}
    if name in PARAMS.baseline.specs:
        model["label"] = PARAMS.baseline.specs[name].label
    report = {
        "model": model,
        "validation": {"sha256": "a" * 64, **SPLIT},
        "window": LIKELIHOOD.window,
        "loss": {"value": loss, "low": loss - 0.1, "high": loss + 0.1},
        "perplexity": {"value": math.exp(loss), "low": math.exp(loss - 0.1), "high": math.exp(loss + 0.1)},
        "bits_per_byte": {"value": bits, "low": bits - 0.03, "high": bits + 0.03},
    }
    compact = name == "compact"
    path = reports / ("evaluation.json" if compact else f"baseline/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    totals = data / ("evaluation/compact.parquet" if compact else f"baseline/{name}.parquet")
    totals.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{i:032x}" for i in range(DOCUMENTS)]
    own = pyarrow.nulls(DOCUMENTS, pyarrow.int64())
    columns = {"id": ids, "bytes": bytes_, "tokens": TOKENS, "own_tokens": own, "nats": nats}
    if is_neural:  # the baseline gains from a longer context; the compact model's context is the window
        shift = 0.0 if compact else 0.7
        bounds = {"value": loss - shift, "low": loss - shift - 0.1, "high": loss - shift + 0.1}
        views = {"own": {"context": 128 if compact else 1024, "stride": 1024, "loss": bounds}}
        views["own"] |= {"perplexity": bounds, "bits_per_byte": bounds}
        edit(path, lambda report: report.update(views=views))
        columns["nats_own"] = nats - shift * TOKENS
    pyarrow.parquet.write_table(pyarrow.table(columns), totals)


def make_place(folder: Path) -> Path:
    """A repository's inputs, reports and sums, as the other stages leave them."""
    reports, data = folder / "reports", folder / "data"
    for name in ("claims.yaml", "published.yaml", "params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("src", "stages"):
        (folder / name).symlink_to(ROOT / name)
    for name in LOSSES:
        write_score(reports, data, name)
    write(reports / "estimate.json", estimate(PARAMS))
    write(reports / "training.json", {"tokens": 409_600, "train_loss": 4.6, "val_loss": 4.5})
    (reports / "loss.csv").write_text("step,train_loss,val_loss\n1,10.8,10.7\n400,5.5,5.0\n800,4.6,4.5\n")
    write(reports / "samples.json", {"samples": []})
    passed = {"expectations": [{"success": True}]}
    write(reports / "validation.json", passed)
    write(reports / "inspection.json", {**passed, "flagged": []})
    part = {"name": "numpy", "version": "2.4.6", "licence": "BSD-3-Clause", "documents": 40, "bytes": 9}
    corpus = {"corpus": "docstrings", "name": "docstrings", "documents": 90, "bytes": 9000}
    write(reports / "download.json", {**corpus, "left_out": {"short": 3}, "sources": [part]})
    splits = {"train": {**SPLIT, "sha256": "b" * 64}, "val": {**SPLIT, "sha256": "a" * 64}}
    tokenizer = {"encoding": "gpt2", "tokenizer_sha256": "c" * 64}
    write(reports / "tokenization.json", {"tokenizer": tokenizer, **splits})
    weights = {"sha256": "d" * 64, "bytes": 9}
    write(folder / "models/compact/manifest.json", {"files": {"model.safetensors": weights}})
    add_measurements(folder)
    return folder


def write(path: Path, value: dict) -> None:
    """Write a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sources_of(place: Path, names=NAMES):
    """Read what the place holds."""
    baseline = PARAMS.baseline.model_copy(update={"names": tuple(names)})
    params = PARAMS.model_copy(update={"baseline": baseline})
    return read_sources(place, place / "reports", place / "data", place / "models", params)


def record_of(place: Path) -> dict:
    """The comparison's record of a place, as it is read back from JSON."""
    return json.loads(json.dumps(build_record(sources_of(place))))


def run_comparison(place: Path, *more: str):
    """Run the stage script in a place."""
    with contextlib.chdir(place):
        return CliRunner().invoke(app, ["--tracker", "none", *map(str, more)])


def edit(path: Path, change) -> None:
    """Change a report in place."""
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def add_measurements(place):
    """What the evaluation and a baseline add beside likelihood."""
    bounds = {"value": 0.25, "low": 0.1, "high": 0.5}
    figures = {"distinct_2": bounds, "seq_rep_4": bounds}
    statistics = {"greedy": {**figures, "zipf": None}, "human": figures}
    places = [{"first": n, "last": n, "tokens": 40, "loss": bounds} for n in (1, 2)]
    for report, hits in (("evaluation.json", "1100"), ("baseline/smollm2-135m-instruct-q4.json", "0110")):
        tasks = {"cloze": {"items_sha256": "x", "accuracy": bounds, "hits": hits}, "wikitext-2": {}}
        sample = {"prompt": "The | future", "document": None, "greedy": {"text": "| is\n| here"}}
        text = {"statistics": statistics, "samples": [sample]}
        added = {"tasks": tasks, "text": text, "by_position": places}
        edit(place / "reports" / report, lambda r, added=added: r.update(added))
    (place / "reports/samples.json").write_text(json.dumps({"samples": [sample]}))
    flagged = {"flagged": [{"id": f"{7:032x}"}, {"id": "of another split"}]}
    (place / "reports/inspection.json").write_text(json.dumps(flagged))
