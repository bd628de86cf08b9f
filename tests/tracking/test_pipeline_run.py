"""The run of a whole `dvc repro`: what became of every stage, and what it has of its own stages only."""

import json
import time
from pathlib import Path

import pytest

from compactgpt.common.errors import Unreachable
from compactgpt.common.storage import read_json
from compactgpt.tracking import mlflow_logger, registry, run_folder
from compactgpt.tracking.journal import stage_metrics
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.run_folder import run_folders
from compactgpt.tracking.store import open_store
from tests.support import tracking_store
from tests.support.tracking_store import copy, ended_dvc, journal, runs, stage_statuses

STAGES = {"training": ["reports/training.json"], "evaluation": ["reports/evaluation.json", "data/evaluation"]}
DEPS = {"evaluation": ["reports/training.json"]}


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    """A project of two stages."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a b"
    root.mkdir()
    monkeypatch.chdir(root)
    (root / "mlflow.db").write_bytes(empty_store)
    (root / "dvc.yaml").write_text("stages: {training: {cmd: x}, evaluation: {cmd: x}}")
    (root / "params.yaml").write_text("model: {n_layer: 2}")
    make(root, 4.5)
    return root


def make(root: Path, loss: float, steps: int = 20) -> None:
    """Both stages' outs, and what DVC writes of them."""
    (root / "data/evaluation").mkdir(parents=True, exist_ok=True)
    (root / "data/evaluation/compact.parquet").write_text(str(loss))
    (root / "reports").mkdir(exist_ok=True)
    (root / "reports/training.json").write_text(json.dumps({"best_val_loss": steps}))
    (root / "reports/evaluation.json").write_text(json.dumps({"loss": {"value": loss}}))
    tracking_store.cache_out(root, "data/evaluation")
    tracking_store.save_lock(root, STAGES, DEPS, model={"n_layer": 2})


def stage(root: Path, name: str, pipeline: dict, status: str = "FINISHED") -> None:
    run = journal(root, name, pipeline=pipeline, workspace=str(root))
    if metrics := stage_metrics(name, read_json(root / f"reports/{name}.json")):
        run.metrics(metrics)
    run.artifact(root / f"reports/{name}.json", "reports")
    run.end(status)


def named(root: Path) -> dict:
    return {run.data.tags["stage"]: run for run in runs(root)}


def wholes(root: Path) -> list:
    return [run for run in runs(root) if run.data.tags["stage"] == "pipeline"]


def test_a_skipped_stage_is_named_with_a_link_to_the_run_that_made_it(root):
    first = ended_dvc()
    for name in STAGES:
        stage(root, name, first)
    sync(root)
    before = named(root)
    assert before["pipeline"].info.status == "FINISHED"
    assert {fate for fate, _ in stage_statuses(before["pipeline"]).values()} == {"ran (finished)"}
    journal_of_second = ended_dvc()
    (root / "reports/evaluation.json").write_text(json.dumps({"loss": {"value": 4.0}}))
    run = journal(root, "evaluation", pipeline=journal_of_second, workspace=str(root))
    run.artifact(root / "reports/evaluation.json", "reports")
    run.end("FINISHED")
    tracking_store.save_lock(root, STAGES, DEPS, model={"n_layer": 2})
    sync(root)
    second = wholes(root)[-1]
    maker = before["training"].info.run_id
    link = f"[run {maker[:8]}](#/experiments/{second.info.experiment_id}/runs/{maker})"
    assert stage_statuses(second)["training"] == ("skipped: unchanged", link)
    assert stage_statuses(second)["evaluation"][0] == "ran (finished)"


def test_what_comes_from_the_run_cache_differs_from_what_did_not_change(root):
    old = ended_dvc()
    for name in STAGES:
        stage(root, name, old)
    sync(root)
    lock = (root / "dvc.lock").read_bytes()
    (root / "reports/training.json").write_text(json.dumps({"best_val_loss": 30}))
    tracking_store.save_lock(root, STAGES, DEPS, model={"n_layer": 2})
    run = journal(root, "evaluation", pipeline=ended_dvc(), workspace=str(root))
    run.artifact(root / "reports/evaluation.json", "reports")
    run.end("FINISHED")
    (root / "reports/training.json").write_text(json.dumps({"best_val_loss": 20}))
    (root / "dvc.lock").write_bytes(lock)  # as DVC does when its run cache has the stage
    sync(root)
    found = stage_statuses(wholes(root)[-1])
    assert found["training"][0] == "skipped: from the run cache of DVC"
    assert "#/experiments/" in found["training"][1]


def test_a_chain_that_breaks_says_where(root):
    pipeline = ended_dvc()
    stage(root, "training", pipeline, "KILLED")
    sync(root)
    parent = named(root)["pipeline"]
    assert parent.info.status == "KILLED"
    assert stage_statuses(parent) == {
        "training": ("ran (killed)", stage_statuses(parent)["training"][1]),
        "evaluation": ("not reached", ""),
    }


def test_a_run_is_no_maker_of_outs_that_dvc_did_not_write_down(root):
    pipeline = ended_dvc()
    stage(root, "training", pipeline)
    (root / "reports/training.json").write_text(json.dumps({"best_val_loss": 10}))
    tracking_store.save_lock(
        root, STAGES, DEPS, model={"n_layer": 2}
    )  # of before: `dvc` was killed when the stage had ended
    sync(root)
    assert "lock_entry" not in named(root)["training"].data.tags


def test_the_run_of_the_whole_keeps_params_figures_and_files(root, tmp_path):
    stage(root, "evaluation", ended_dvc())
    (root / "reports/training.json").write_text("of another run by now")
    sync(root)
    parent = named(root)["pipeline"]
    assert parent.data.params == {"model.n_layer": "2"}
    assert parent.data.metrics == {"eval/loss": 4.5}
    assert parent.data.tags["command"] == "dvc repro"
    assert parent.data.tags["lock_sha256"] == tracking_store.sha256((root / "dvc.lock").read_bytes())
    kept = Path(open_store(root).client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (kept / "dvc.lock").read_bytes() == (root / "dvc.lock").read_bytes()
    assert (kept / "data/evaluation/compact.parquet").read_text() == "4.5"
    assert "mlflow==" in (kept / "environment/packages.txt").read_text()
    assert not (kept / "reports/training.json").exists()


def test_a_repro_that_runs_nothing_is_logged_once(root):
    sync(root, record_unrun=True)
    sync(root, record_unrun=True)
    (only,) = runs(root)
    assert only.info.status == "FINISHED"
    assert stage_statuses(only)["training"] == ("skipped: unchanged", "no run known here")
    make(root, 3.0)
    sync(root, record_unrun=True)
    assert len(runs(root)) == 2


def test_a_lock_that_does_not_belong_to_the_params_is_no_run(root):
    """As after an experiment that failed, once params.yaml was taken back."""
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    sync(root, record_unrun=True)
    assert runs(root) == []


def test_a_dead_server_changes_nothing_of_what_is_logged_later(root, monkeypatch):
    monkeypatch.setattr(mlflow_logger, "PATIENCE_SECONDS", 0.5)
    stage(root, "evaluation", ended_dvc())
    with monkeypatch.context() as patched:
        patched.setattr(mlflow_logger, "open_store", refuse)
        mlflow_logger.follow(run_folders(root)[0])
    make(root, 3.0)  # the next run
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    sync(root)
    (parent,) = wholes(root)
    assert parent.data.metrics == {"val/best_loss": 20.0, "eval/loss": 4.5}
    assert parent.data.params == {"model.n_layer": "2"}


def refuse(*_):
    raise Unreachable("no server")


def test_a_run_that_is_copied_late_reads_what_the_next_one_found(root):
    stage(root, "evaluation", ended_dvc())
    time.sleep(1.1)  # names of run folders have seconds
    make(root, 3.0)
    stage(root, "evaluation", ended_dvc())
    first, second = run_folders(root)
    assert first.keep_after()
    kept = (first.path / "after/dvc.lock").read_bytes()
    assert kept == (second.path / "before/dvc.lock").read_bytes()


def test_an_empty_lock_is_read_again_and_then_reported(root, monkeypatch):
    stage(root, "evaluation", ended_dvc())
    lock = (root / "dvc.lock").read_bytes()
    (root / "dvc.lock").write_bytes(b"")  # DVC writes it in place
    assert not copy(root)
    assert wholes(root)[0].info.status == "RUNNING"
    monkeypatch.setattr(run_folder, "OUTCOME_SECONDS", -1.0)
    assert copy(root)
    (parent,) = wholes(root)
    assert parent.info.status == "FAILED"
    assert "dvc.lock is empty or missing" in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics == {"eval/loss": 4.5}  # its own stage's
    monkeypatch.setattr(run_folder, "OUTCOME_SECONDS", 30.0)
    stage(root, "training", ended_dvc())
    (root / "dvc.lock").write_bytes(b"")
    assert not copy(root)
    (root / "dvc.lock").write_bytes(lock)
    assert copy(root)
    assert wholes(root)[-1].info.status == "FINISHED"


def test_a_lock_that_cannot_be_read_closes_the_run_all_the_same(root):
    stage(root, "evaluation", ended_dvc())
    (root / "dvc.lock").write_text("stages: {evaluation: [")
    sync(root)
    (parent,) = wholes(root)
    assert parent.info.status == "FAILED"
    assert "not valid YAML" in parent.data.tags["mlflow.note.content"]


def test_a_stopped_run_has_its_own_params_and_no_figure_of_an_older_model(root):
    older = ended_dvc()
    for name in STAGES:
        stage(root, name, older)
    sync(root)
    assert wholes(root)[0].data.metrics == {"val/best_loss": 20.0, "eval/loss": 4.5}
    time.sleep(1.1)
    (root / "params.yaml").write_text("model: {n_layer: 60}")
    run = journal(root, "training", pipeline=ended_dvc(), workspace=str(root))
    run.metrics({"train/loss": 7.0}, 7)
    run.end("KILLED")
    sync(root)
    stopped = wholes(root)[-1]
    assert stopped.info.status == "KILLED"
    assert stopped.data.params == {"model.n_layer": "60"}
    assert stopped.data.metrics == {"train/loss": 7.0}
    assert "weights_sha256" not in stopped.data.tags
    assert stage_statuses(stopped)["evaluation"] == ("not reached", "")


def test_figures_of_a_skipped_stage_need_the_same_params_code_and_inputs(root):
    (root / "code.py").write_text("1")
    tracking_store.save_lock(
        root, STAGES, {"evaluation": ["reports/training.json", "code.py"]}, model={"n_layer": 2}
    )
    stage(root, "training", ended_dvc())
    sync(root)
    assert stage_statuses(wholes(root)[-1])["evaluation"][0] == "skipped: unchanged"
    assert wholes(root)[-1].data.metrics["eval/loss"] == 4.5
    for change in ("code.py", "params.yaml"):
        before = (root / change).read_text()
        (root / change).write_text("model: {n_layer: 3}")
        time.sleep(1.1)
        stage(root, "training", ended_dvc())
        sync(root)
        (root / change).write_text(before)
        assert stage_statuses(wholes(root)[-1])["evaluation"][0] == "not reached", change
        assert "eval/loss" not in wholes(root)[-1].data.metrics


def test_a_resumed_training_gives_its_pipeline_the_whole_curve(root):
    note = root / "state/journal"
    first = journal(root, held=True, pipeline=ended_dvc(), workspace=str(root))
    first.begin(note)
    first.metrics({"train/loss": 3.0}, 1)
    first.end("KILLED")
    sync(root)
    time.sleep(1.1)
    rest = journal(root, held=True, pipeline=ended_dvc(), workspace=str(root))
    rest.begin(note)
    rest.metrics({"train/loss": 2.0}, 2)
    rest.end("FINISHED")
    sync(root)
    killed, whole = wholes(root)
    client = open_store(root).client
    points = [
        [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")]
        for run in (killed, whole)
    ]
    assert points == [[(1, 3.0)], [(1, 3.0), (2, 2.0)]]
    assert named(root)["training"].data.tags["mlflow.parentRunId"] == whole.info.run_id


def test_a_model_that_cannot_be_logged_leaves_the_run_whole(root, monkeypatch):
    def fail(*_):
        raise ValueError("no space")

    monkeypatch.setattr(registry, "log_model", fail)
    (root / "models/compact").mkdir(parents=True)
    facts = {"files": {"model.safetensors": {"sha256": "0" * 64}}}
    (root / "models/compact/manifest.json").write_text(json.dumps(facts))
    tracking_store.cache_out(root, "models/compact")
    tracking_store.save_lock(root, {**STAGES, "training": ["models/compact", "reports/training.json"]}, DEPS)
    stage(root, "training", ended_dvc())
    for _ in range(4):  # quick failures do not give it up
        with pytest.raises(Unreachable, match="no space"):
            sync(root)
    parent = named(root)["pipeline"]
    assert (parent.info.status, parent.data.tags["weights_sha256"]) == ("FINISHED", "0" * 64)
    monkeypatch.setattr(registry, "log_model", lambda *_: "m-1")
    sync(root)
    assert named(root)["pipeline"].data.tags["model_id"] == "m-1"


def test_an_experiment_is_read_from_the_commit_that_dvc_keeps(root, tmp_path, monkeypatch):
    """Its scratch folder is being removed; the commit comes some seconds after its process has ended."""
    tracking_store.git(root, "init", "-q")
    tracking_store.git(root, "add", "dvc.yaml", "params.yaml", "dvc.lock", "reports")
    tracking_store.git(root, "commit", "-qm", "x")
    baseline = tracking_store.git(root, "rev-parse", "HEAD")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("dvc.yaml", "dvc.lock"):
        (scratch / name).write_bytes((root / name).read_bytes())
    (scratch / "params.yaml").write_text("model: {n_layer: 3}")
    pipeline = {**ended_dvc(), "command": "dvc exp exec-run --infofile x.run"}
    tags = {"dvc.experiment": "wide", "dvc.baseline": baseline}
    run = journal(root, "training", pipeline=pipeline, workspace=str(scratch), tags=tags)
    run.end("FINISHED")
    assert not copy(root)  # no commit yet
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    (root / "reports/training.json").write_text(json.dumps({"best_val_loss": 1.0}))
    tracking_store.save_lock(root, STAGES, DEPS, model={"n_layer": 3})
    tracking_store.git(root, "commit", "-qam", "wide")
    tracking_store.git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/wide", "HEAD")
    lock = (root / "dvc.lock").read_bytes()
    make(root, 9.0)  # another experiment, in the workspace
    sync(root)
    (parent,) = wholes(root)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "wide")
    assert parent.data.tags["lock_sha256"] == tracking_store.sha256(lock)
    assert parent.data.tags["mlflow.source.name"] == "dvc exp run -n wide -S model.n_layer=3"


def test_an_experiment_without_a_commit_is_reported(root, monkeypatch):
    tags = {"dvc.experiment": "lost", "dvc.baseline": "0" * 40}
    run = journal(root, "training", pipeline=ended_dvc(), tags=tags)
    run.end("FINISHED")
    assert not copy(root)
    monkeypatch.setattr(run_folder, "OUTCOME_SECONDS", -1.0)
    assert copy(root)
    (parent,) = wholes(root)
    assert parent.info.status == "FAILED"
    assert "dvc.lock is empty or missing" in parent.data.tags["mlflow.note.content"]
