"""What the other stages leave for the comparison, small and made up: shared by the tests of its readers."""

import contextlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from compactgpt.config import load_params
from compactgpt.evaluation.likelihood import IN_WINDOW
from compactgpt.evaluation.metrics import Interval, perplexity, wilson
from compactgpt.evaluation.totals import Totals, write_totals
from compactgpt.forecast.estimate import estimate
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.schemas import read_sources
from stages.comparison import app

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
LIKELIHOOD = PARAMS.evaluation.likelihood
NAMES = PARAMS.baseline.names
SMOLLM = "smollm2-135m-instruct-q4"
DOCUMENTS = 40
IDS = [f"{number:032x}" for number in range(DOCUMENTS)]
TOKENS = np.random.default_rng(0).integers(20, 200, DOCUMENTS)
SPLIT = {"documents": DOCUMENTS, "tokens": int(TOKENS.sum()), "bytes": int(TOKENS.sum()) * 4}
DIFFICULTY = np.random.default_rng(1).normal(0, 0.5, DOCUMENTS)
LOSSES = {"compact": 4.4, **{name: 3.0 + 0.7 * place for place, name in enumerate(NAMES)}}


def nats_of(name: str) -> np.ndarray:
    noise = np.random.default_rng(list(LOSSES).index(name)).normal(0, 0.05, DOCUMENTS)
    return TOKENS * (LOSSES[name] + DIFFICULTY + noise)


def scores(loss: float) -> dict:
    """Return a loss with a made-up interval, and the scores that follow from it at 4 bytes per token."""
    interval = Interval(loss, loss - 0.1, loss + 0.1)
    bits = interval.map(lambda nats: nats / math.log(2) / 4)
    found = {"loss": interval, "perplexity": interval.map(perplexity), "bits_per_byte": bits}
    return {name: one.as_report() for name, one in found.items()}


def write_score(folder: Path, name: str, path: str) -> None:
    """Write the report of a model and its losses by document."""
    nats, spec = nats_of(name), PARAMS.baseline.specs.get(name)
    loss = nats.sum() / TOKENS.sum()
    is_neural = spec is None or spec.kind in ("gguf", "hub", "folder")
    report = {
        "model": {
            "kind": "test",
            "label": spec.label if spec else "",
            "context": IN_WINDOW if is_neural else "c",
            "num_params": None if name == "xz" else 1_234_567,
        },
        "validation": {"sha256": "a" * 64, **SPLIT},
        "window": LIKELIHOOD.window,
        **scores(loss),
    }
    views = {}
    if is_neural:  # the baseline gains from a longer context; the compact model's context is the window
        context, gain = (1024, 0.7) if spec else (LIKELIHOOD.window, 0.0)
        report["views"] = {"own": {"context": context, "stride": 1024, **scores(loss - gain)}}
        views["own"] = nats - gain * TOKENS
    write(folder / f"reports/{path}.json", report)
    totals = Totals(IDS, TOKENS * 4, TOKENS, None, nats, views=views)
    write_totals(folder / f"data/{path if spec else 'evaluation/compact'}.parquet", totals)


def make_place(folder: Path) -> Path:
    """A repository's inputs, reports and sums, as the other stages leave them."""
    reports = folder / "reports"
    for name in ("claims.yaml", "published.yaml", "params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("src", "stages"):
        (folder / name).symlink_to(ROOT / name)
    write_score(folder, "compact", "evaluation")
    for name in NAMES:
        write_score(folder, name, f"baseline/{name}")
    write(reports / "estimate.json", estimate(PARAMS))
    write(reports / "training.json", {"tokens": 409_600, "train_loss": 4.6, "val_loss": 4.5})
    (reports / "loss.csv").write_text("step,train_loss,val_loss\n1,10.8,10.7\n400,5.5,5.0\n800,4.6,4.5\n")
    write(reports / "validation.json", {"expectations": [{"success": True}]})
    write(reports / "inspection.json", {"flagged": [{"id": IDS[7]}, {"id": "of another split"}]})
    part = {"name": "numpy", "version": "2.4.6", "licence": "BSD-3-Clause", "documents": 40, "bytes": 9}
    corpus = {"corpus": "docstrings", "name": "docstrings", "documents": 90, "bytes": 9000}
    write(reports / "download.json", {**corpus, "left_out": {"short": 3}, "sources": [part]})
    splits = {"train": {**SPLIT, "sha256": "b" * 64}, "val": {**SPLIT, "sha256": "a" * 64}}
    tokenizer = {"encoding": "gpt2", "tokenizer_sha256": "c" * 64}
    write(reports / "tokenization.json", {"tokenizer": tokenizer, **splits})
    weights = {"sha256": "d" * 64, "bytes": 9}
    write(folder / "models/compact/manifest.json", {"files": {"model.safetensors": weights}})
    sample = {"prompt": "The | future", "document": None, "greedy": {"text": "| is\n| here"}}
    write(reports / "samples.json", {"samples": [sample]})
    bounds = {"value": 0.25, "low": 0.1, "high": 0.5}
    figures = {"distinct_2": bounds, "seq_rep_4": bounds}
    statistics = {"greedy": {**figures, "zipf": None}, "human": figures}
    added = {
        "text": {"statistics": statistics, "samples": [sample]},
        "by_position": [{"first": n, "last": n, "tokens": 40, "loss": bounds} for n in (1, 2)],
    }
    for name, hits in (("evaluation", "1100"), (f"baseline/{SMOLLM}", "0110")):
        cloze = {"items_sha256": "x", "accuracy": asdict(wilson(2, 4)), "hits": hits}
        added["tasks"] = {"cloze": cloze, "wikitext-2": {}}
        edit(reports / f"{name}.json", lambda report: report.update(added))
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
    write(path, report)
