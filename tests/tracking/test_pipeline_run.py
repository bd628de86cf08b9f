"""The run of a whole `dvc repro`: the status of every stage, and only metrics that belong to the run."""

import time
from pathlib import Path

import pytest

from compactgpt.common.errors import Unreachable
from compactgpt.common.storage import read_json, write_json, write_text
from compactgpt.tracking import mlflow_logger, registry
from compactgpt.tracking.journal import stage_metrics
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import run_folders
from compactgpt.tracking.store import open_store
from tests.support import tracking_store
from tests.support.tracking_store import (
    copy,
    ended_dvc,
    enter_project,
    git,
    history,
    journal,
    runs,
    save_lock,
    stage_statuses,
)

STAGES = {
    "training": ["reports/training.json", "reports/loss.csv"],
    "evaluation": ["reports/evaluation.json", "data/evaluation"],
}
CURVE = {"train/loss": 4.0, "val/loss": 4.5}  # at its end
DEPS = {"evaluation": ["reports/training.json", "code"]}


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    """A project with two stages whose outputs are in dvc.lock."""
    stages = "{training: {cmd: x}, evaluation: {cmd: x}}"
    root = enter_project(tmp_path / "a b", empty_store, monkeypatch, stages)
    write_text(root / "params.yaml", "model: {n_layer: 2}")
    write_text(root / "code/evaluation.py", "1")
    make(root, 4.5)
    return root


def make(root: Path, loss: float) -> None:
    """Write the outputs of both stages, and dvc.lock."""
    write_text(root / "data/evaluation/compact.parquet", str(loss))
    write_json(root / "reports/training.json", {"best_val_loss": 20})
    write_text(root / "reports/loss.csv", "step,train_loss,val_loss\n1,5.0,\n2,4.0,4.5\n")
    write_json(root / "reports/evaluation.json", {"loss": {"value": loss}})
    save_lock(root, STAGES, DEPS, model={"n_layer": 2})


def run_stage(root: Path, name: str, pipeline: dict, status: str = "FINISHED") -> None:
    """Log one stage of a `dvc` process, as its script does."""
    run = journal(root, name, pipeline=pipeline)
    run.metrics(stage_metrics(name, read_json(root / f"reports/{name}.json")))
    run.artifact(root / f"reports/{name}.json", "reports")
    run.end(status)


def run_pipeline(root: Path, *stages: str, status: str = "FINISHED", command: str = "dvc repro"):
    """Log stages of one `dvc` process, copy the journals, and return the pipeline's run."""
    pipeline = ended_dvc(command)
    for name in stages:
        run_stage(root, name, pipeline, status)
    sync(root)
    return runs(root, "pipeline")[-1]


def refuse(*_):
    raise Unreachable("no server")


def test_a_pipeline_has_its_stages_with_metrics_params_and_files(root, tmp_path):
    parent = run_pipeline(root, "training", "evaluation")
    assert (parent.info.status, parent.data.params) == ("FINISHED", {"model.n_layer": "2"})
    assert parent.data.metrics == {"val/best_loss": 20.0, "eval/loss": 4.5}
    assert {what for what, _ in stage_statuses(parent).values()} == {"ran (finished)"}
    assert parent.data.tags["command"] == "dvc repro"
    assert parent.data.tags["lock_sha256"] == tracking_store.sha256((root / "dvc.lock").read_bytes())
    stages = [run for run in runs(root) if run.info.run_id != parent.info.run_id]
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {parent.info.run_id}
    kept = Path(open_store(root).client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (kept / "dvc.lock").read_bytes() == (root / "dvc.lock").read_bytes()
    assert (kept / "data/evaluation/compact.parquet").read_text() == "4.5"
    assert "mlflow==" in (kept / "environment/packages.txt").read_text()


def test_a_skipped_stage_is_named_with_a_link_to_the_run_that_made_it(root):
    run_pipeline(root, "training", "evaluation")
    maker = runs(root, "training")[0].info.run_id
    lock = (root / "dvc.lock").read_bytes()
    second = run_pipeline(root, "evaluation")
    link = f"[run {maker[:8]}](#/experiments/{second.info.experiment_id}/runs/{maker})"
    assert stage_statuses(second)["training"] == ("skipped: unchanged", link)
    assert second.data.metrics == {"val/best_loss": 20.0, "eval/loss": 4.5, **CURVE}
    assert history(root, second, "train/loss") == [(1, 5.0), (2, 4.0)]
    (root / "dvc.lock").write_text("stages: {}")
    pipeline = ended_dvc()
    run_stage(root, "evaluation", pipeline)
    (root / "dvc.lock").write_bytes(lock)  # as DVC does when its run cache has the training
    sync(root)
    third = runs(root, "pipeline")[-1]
    assert stage_statuses(third)["training"] == ("skipped: from the run cache of DVC", link)


@pytest.mark.parametrize(
    ("ended", "command", "status"),
    [
        ("FINISHED", "dvc repro", "FAILED"),  # `dvc` was killed between the stages
        ("FINISHED", "dvc repro training", "FINISHED"),
        ("KILLED", "dvc repro", "KILLED"),
    ],
)
def test_a_pipeline_that_did_not_reach_its_end_has_no_metric_of_an_older_model(root, ended, command, status):
    run_pipeline(root, "training", "evaluation")
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    save_lock(root, {"training": STAGES["training"]}, DEPS, model={"n_layer": 3})
    found = run_pipeline(root, "training", status=ended, command=command)
    assert (found.info.status, found.data.params) == (status, {"model.n_layer": "3"})
    assert "eval/loss" not in found.data.metrics
    statuses = {stage: what for stage, (what, _) in stage_statuses(found).items()}
    assert statuses == {"training": f"ran ({ended.lower()})", "evaluation": "not reached"}
    has_reason = "dvc.lock has no results for" in found.data.tags["mlflow.note.content"]
    assert has_reason == (status != "FINISHED")


@pytest.mark.parametrize(
    ("change", "status"), [("code/evaluation.py", "FAILED"), ("params.yaml", "FAILED"), ("", "FINISHED")]
)
def test_a_skipped_stage_counts_only_with_the_same_code_and_params_even_if_kept_late(root, change, status):
    if change:
        (root / change).write_text("model: {n_layer: 3}")
    for _ in range(2):  # the second starts before the end of the first is kept
        run_stage(root, "training", ended_dvc())
        time.sleep(0.05)  # psutil knows the start of `dvc` to a hundredth of a second
    sync(root)
    for parent in runs(root, "pipeline"):
        assert parent.info.status == status
        assert not change or "eval/loss" not in parent.data.metrics


def test_a_repro_that_runs_nothing_is_logged_once_if_the_lock_belongs_to_the_params(root, monkeypatch):
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text("model: {n_layer: 3}")  # as after an experiment that failed
    sync(root)
    assert runs(root) == []
    (root / "params.yaml").write_text(params)
    for _ in range(2):
        sync(root)
    (only,) = runs(root)
    assert only.info.status == "FINISHED"
    assert stage_statuses(only)["training"] == ("skipped: unchanged", "unknown: MLflow lacks this run")
    monkeypatch.setattr(mlflow_logger, "open_store", refuse)
    sync(root)  # nothing to do: without MLflow, whose import takes seconds
    (root / "mlflow.db").unlink()
    with pytest.raises(Unreachable):
        sync(root)


def test_files_of_a_run_that_a_dead_server_missed_are_kept_and_the_log_has_each_error_once(
    root, monkeypatch, caplog
):
    monkeypatch.setattr(mlflow_logger, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(mlflow_logger, "POLL_SECONDS", 0.1)
    run_stage(root, "evaluation", ended_dvc())
    with monkeypatch.context() as patched:
        patched.setattr(mlflow_logger, "open_store", refuse)
        mlflow_logger.follow(run_folders(root)[0])
    assert len(caplog.records) == 1
    make(root, 3.0)  # the next run
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    sync(root)
    (parent,) = runs(root, "pipeline")
    assert parent.data.metrics == {"val/best_loss": 20.0, "eval/loss": 4.5, **CURVE}
    assert parent.data.params == {"model.n_layer": "2"}


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ("", "dvc.lock has no results for training, evaluation"),
        ("stages: {evaluation: [", "not a valid YAML mapping"),
    ],
)
def test_a_lock_that_is_empty_or_damaged_is_reported(root, lock, reason):
    run_stage(root, "evaluation", ended_dvc())
    (root / "dvc.lock").write_text(lock)
    sync(root)
    (parent,) = runs(root, "pipeline")
    assert parent.info.status == "FAILED"
    assert reason in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics == {"eval/loss": 4.5}  # of its own stage


def test_a_model_that_cannot_be_logged_leaves_the_run_complete_and_sync_tries_again(root, monkeypatch):
    monkeypatch.setattr(registry, "log_model", refuse)
    facts = {"files": {"model.safetensors": {"sha256": "0" * 64}}}
    write_json(root / "models/compact/manifest.json", facts)
    stages = {**STAGES, "training": ["models/compact", "reports/training.json"]}
    save_lock(root, stages, DEPS, model={"n_layer": 2})
    run_stage(root, "training", ended_dvc())
    for _ in range(2):
        with pytest.raises(Unreachable, match="no server"):
            sync(root)
    (parent,) = runs(root, "pipeline")
    assert (parent.info.status, parent.data.tags["weights_sha256"]) == ("FINISHED", "0" * 64)
    monkeypatch.setattr(registry, "log_model", lambda *_: "m-1")
    sync(root)
    assert runs(root, "pipeline")[0].data.tags["model_id"] == "m-1"


def test_an_experiment_is_read_from_the_commit_that_dvc_keeps(root, tmp_path):
    """Its scratch folder is being removed; the commit comes some seconds after its process has ended."""
    git(root, "init", "-q")
    git(root, "add", "dvc.yaml", "params.yaml", "dvc.lock", "reports")
    git(root, "commit", "-qm", "x")
    baseline = git(root, "rev-parse", "HEAD")
    scratch = tmp_path / "scratch"
    write_text(scratch / "dvc.yaml", (root / "dvc.yaml").read_text())
    write_text(scratch / "params.yaml", "model: {n_layer: 3}")
    tags = {"dvc.experiment": "wide", "dvc.baseline": baseline}
    pipeline = ended_dvc("dvc exp exec-run --infofile x.run")
    journal(root, "training", pipeline=pipeline, workspace=str(scratch), tags=tags).end("FINISHED")
    assert not copy(root)  # no commit yet
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    write_json(root / "reports/training.json", {"best_val_loss": 1.0})
    save_lock(root, STAGES, DEPS, model={"n_layer": 3})
    git(root, "commit", "-qam", "wide")
    git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/wide", "HEAD")
    lock = (root / "dvc.lock").read_bytes()
    make(root, 9.0)  # another experiment, in the workspace
    sync(root)
    (parent,) = runs(root, "pipeline")
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "wide")
    assert parent.data.tags["lock_sha256"] == tracking_store.sha256(lock)
    assert parent.data.tags["mlflow.source.name"] == "dvc exp run -n wide"
