"""The run of a whole `dvc repro` tells what became of every stage, and keeps what runs it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from compactgpt import registry
from compactgpt.syncing import Syncer, drain
from tests import store
from tests.store import journal, runs

STAGES = {"training": ["reports/training.json"], "evaluation": ["reports/evaluation.json", "data/evaluation"]}


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    """A project of two stages."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a b"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store)
    (root / "dvc.yaml").write_text("stages: {training: {cmd: x}, evaluation: {cmd: x}}")
    (root / "params.yaml").write_text("model: {n_layer: 2}")
    make(root, 4.5)
    return root


def make(root: Path, loss: float) -> None:
    """Both stages' outs, and what DVC writes of them."""
    (root / "data/evaluation").mkdir(parents=True, exist_ok=True)
    (root / "data/evaluation/compact.parquet").write_text(str(loss))
    (root / "reports").mkdir(exist_ok=True)
    (root / "reports/training.json").write_text(json.dumps({"steps": 20}))
    (root / "reports/evaluation.json").write_text(json.dumps({"loss": {"value": loss}}))
    store.cache_out(root, "data/evaluation")
    store.save_lock(root, STAGES)


def dvc() -> dict:
    """A process that stands for `dvc`, and has ended when the journals are read."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "command": "dvc repro"}
    child.communicate(b"\n")
    return facts


def stage(root: Path, name: str, pipeline: dict, status: str = "FINISHED") -> None:
    run = journal(root, name, pipeline=pipeline, workspace=str(root))
    run.artifact(root / "dvc.lock", "before")
    run.artifact(root / f"reports/{name}.json", "reports")
    run.end(status)


def named(root: Path) -> dict:
    return {run.data.tags["stage"]: run for run in runs(root)}


def wholes(root: Path) -> list:
    return [run for run in runs(root) if run.data.tags["stage"] == "pipeline"]


def fates(run) -> dict[str, tuple[str, str]]:
    rows = [line.split(" | ") for line in run.data.tags["mlflow.note.content"].splitlines() if " | " in line]
    return {row[0].strip("| "): (row[1], row[2].strip("| ")) for row in rows[2:]}


def test_a_skipped_stage_is_named_with_a_link_to_the_run_that_made_it(root):
    first = dvc()
    for name in STAGES:
        stage(root, name, first)
    assert drain(root)
    before = named(root)
    assert before["pipeline"].info.status == "FINISHED"
    assert {fate for fate, _ in fates(before["pipeline"]).values()} == {"ran (finished)"}
    journal_of_second = dvc()
    (root / "reports/evaluation.json").write_text(json.dumps({"loss": {"value": 4.0}}))
    run = journal(root, "evaluation", pipeline=journal_of_second, workspace=str(root))
    run.artifact(root / "dvc.lock", "before")
    run.artifact(root / "reports/evaluation.json", "reports")
    run.end("FINISHED")
    store.save_lock(root, STAGES)
    assert drain(root)
    second = wholes(root)[-1]
    maker = before["training"].info.run_id
    link = f"[run {maker[:8]}](#/experiments/{second.info.experiment_id}/runs/{maker})"
    assert fates(second)["training"] == ("skipped: unchanged", link)
    assert fates(second)["evaluation"][0] == "ran (finished)"


def test_what_comes_from_the_run_cache_is_told_apart_from_what_did_not_change(root):
    old = dvc()
    for name in STAGES:
        stage(root, name, old)
    assert drain(root)
    lock = (root / "dvc.lock").read_bytes()
    (root / "reports/training.json").write_text(json.dumps({"steps": 30}))
    store.save_lock(root, STAGES)
    run = journal(root, "evaluation", pipeline=dvc(), workspace=str(root))
    run.artifact(root / "dvc.lock", "before")
    run.artifact(root / "reports/evaluation.json", "reports")
    run.end("FINISHED")
    (root / "reports/training.json").write_text(json.dumps({"steps": 20}))
    (root / "dvc.lock").write_bytes(lock)  # as DVC does when its run cache has the stage
    assert drain(root)
    told = fates(wholes(root)[-1])
    assert told["training"][0] == "skipped: from DVC's run cache"
    assert "#/experiments/" in told["training"][1]


def test_a_chain_that_breaks_says_where(root):
    pipeline = dvc()
    stage(root, "training", pipeline, "KILLED")
    assert drain(root)
    parent = named(root)["pipeline"]
    assert parent.info.status == "KILLED"
    assert fates(parent) == {
        "training": ("ran (killed)", fates(parent)["training"][1]),
        "evaluation": ("not reached", ""),
    }


def test_a_run_is_no_maker_of_outs_that_dvc_did_not_write_down(root):
    pipeline = dvc()
    stage(root, "training", pipeline)
    (root / "reports/training.json").write_text(json.dumps({"steps": 10}))
    store.save_lock(root, STAGES)  # of before: `dvc` was killed when the stage had ended
    assert drain(root)
    assert "lock_entry" not in named(root)["training"].data.tags


def test_the_run_of_the_whole_keeps_params_figures_and_files(root, tmp_path):
    stage(root, "evaluation", dvc())
    (root / "reports/training.json").write_text("of another run by now")
    assert drain(root)
    parent = named(root)["pipeline"]
    assert parent.data.params == {"model.n_layer": "2"}
    assert parent.data.metrics == {"eval/loss": 4.5}
    assert parent.data.tags["command"] == "dvc repro"
    assert parent.data.tags["lock_sha256"] == store.sha256((root / "dvc.lock").read_bytes())
    kept = Path(Syncer(root).connect()[0].download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (kept / "dvc.lock").read_bytes() == (root / "dvc.lock").read_bytes()
    assert (kept / "data/evaluation/compact.parquet").read_text() == "4.5"
    assert "mlflow==" in (kept / "environment/packages.txt").read_text()
    assert not (kept / "reports/training.json").exists()


def test_a_repro_that_runs_nothing_is_told_once(root):
    assert drain(root, record_unrun=True)
    assert drain(root, record_unrun=True)
    (only,) = runs(root)
    assert only.info.status == "FINISHED"
    assert fates(only)["training"] == ("skipped: unchanged", "no run known here")
    make(root, 3.0)
    assert drain(root, record_unrun=True)
    assert len(runs(root)) == 2


def test_what_was_left_is_told_though_the_server_was_away_and_the_work_tree_went_on(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    stage(root, "evaluation", dvc())
    with pytest.raises(Exception, match=r"(?i)connection|retries"):
        Syncer(root).sync()
    make(root, 3.0)  # the next run
    (root / "params.yaml").write_text("model: {n_layer: 3}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert drain(root)
    (parent,) = wholes(root)
    assert parent.data.metrics == {"eval/loss": 4.5}
    assert parent.data.params == {"model.n_layer": "2"}


def test_a_lock_that_nobody_can_read_closes_the_run_all_the_same(root):
    stage(root, "evaluation", dvc())
    (root / "dvc.lock").write_text("stages: {evaluation: [")
    assert drain(root)
    (parent,) = wholes(root)
    assert parent.info.status == "FAILED"
    assert "no valid YAML" in parent.data.tags["not_concluded"]


def test_a_parent_whose_notes_were_deleted_is_closed(root):
    stage(root, "training", {"pid": os.getpid(), "created": psutil.Process().create_time()})
    assert not Syncer(root).sync()
    parent = next((root / ".state/tracking/pipelines").iterdir())
    (parent / "parent.json").unlink()
    client, _ = Syncer(root).connect()
    (run,) = wholes(root)
    assert run.info.status == "RUNNING"  # this process lives
    client.set_tag(run.info.run_id, "pipeline", "999999999-1.0")
    Syncer(root).connect()
    assert client.get_run(run.info.run_id).info.status == "KILLED"


def test_a_model_that_cannot_be_logged_leaves_the_run_whole(root, monkeypatch):
    def refuse(*_):
        raise OSError("no room")

    monkeypatch.setattr(registry.Shelf, "register", refuse)
    (root / "models/compact").mkdir(parents=True)
    facts = {"files": {"model.safetensors": {"sha256": "0" * 64}}}
    (root / "models/compact/manifest.json").write_text(json.dumps(facts))
    store.cache_out(root, "models/compact")
    store.save_lock(root, {**STAGES, "training": ["models/compact", "reports/training.json"]})
    stage(root, "training", dvc())
    for _ in range(2):
        with pytest.raises(OSError, match="no room"):
            Syncer(root).sync()
    assert Syncer(root).sync()
    parent = named(root)["pipeline"]
    assert parent.info.status == "FINISHED"
    assert "model: not logged: OSError" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["weights_sha256"] == "0" * 64
