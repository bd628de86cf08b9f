"""A project with a trained model, and the run of a pipeline that logs it."""

from pathlib import Path

from compactgpt.common.storage import sha256_file, write_json
from compactgpt.model.weights import save_model
from compactgpt.tracking.journal import stage_metrics
from compactgpt.tracking.mlflow_logger import sync
from tests.support import tracking_store
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt


def fill(root: Path) -> None:
    """Write a project with a trained model."""
    (root / "dvc.yaml").write_text("stages: {training: {cmd: x}, evaluation: {cmd: x}}")
    (root / "params.yaml").write_text("{model: {n_layer: 2}, training: {max_steps: 9}, download: {a: 1}}")
    encoding = save_tokenizer(root / "data/tokenizer")
    save_model(tiny_gpt(encoding.n_vocab), root / "models/compact")
    save_split(root / "data/tokens/val.tokens", encoding)


def register(root: Path) -> str:
    """Log the model as the run of a pipeline that has ended; returns the id of the run."""
    split = root / "data/tokens/val.tokens"
    facts = {"val.tokens": {"sha256": sha256_file(split), "bytes": split.stat().st_size}}
    write_json(root / "data/tokens/manifest.json", {"files": facts})
    report = {"loss": {"value": 2.0, "low": 1.0, "high": 3.0}}
    write_json(root / "reports/evaluation.json", report)
    outs = {
        "training": ["models/compact", "data/tokenizer", "data/tokens"],
        "evaluation": ["reports/evaluation.json"],
    }
    for path in outs["training"]:
        tracking_store.cache_out(root, path)
    tracking_store.save_lock(root, outs)
    pipeline = tracking_store.ended_dvc()
    tracking_store.journal(root, "training", pipeline=pipeline).end("FINISHED")
    run = tracking_store.journal(root, "evaluation", pipeline=pipeline)
    run.metrics(stage_metrics("evaluation", report))
    run.artifact(root / "reports/evaluation.json", "reports")
    run.end("FINISHED")
    sync(root)
    found = [one for one in tracking_store.runs(root) if one.data.tags["stage"] == "pipeline"]
    return found[-1].info.run_id


def weights(root: Path) -> str:
    return sha256_file(root / "models/compact/model.safetensors")
