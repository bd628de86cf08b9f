"""Experiments of a real DVC: queued, in a temporary folder, in the work tree: each has a complete run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import run_folders
from tests.support import tracking_store
from tests.support.tracking_store import runs, stage_statuses

STAGE = """
import json, os, sys
from pathlib import Path
from ruamel.yaml import YAML
from compactgpt.tracking.journal import Journal, process_facts, state_folder
from compactgpt.tracking.mlflow_logger import start_logger
name = sys.argv[1]
tags = {"dvc.experiment": os.environ["DVC_EXP_NAME"], "dvc.baseline": os.environ["DVC_EXP_BASELINE_REV"]}
run = Journal(state_folder(), name, {"tags": tags, "workspace": os.getcwd(), **process_facts()})
run.keep_before(Path.cwd())
start_logger(run.run_folder)
loss = 1.0 / YAML(typ="safe").load(Path("params.yaml"))["training"]["steps"]
Path("reports").mkdir(exist_ok=True)
Path(f"reports/{name}.json").write_text(json.dumps({"loss": {"value": loss}}))
run.metrics({f"{name}/loss": loss}, 1)
run.artifact(Path(f"reports/{name}.json"), "reports")
run.end("FINISHED")
"""
CHAIN = f"""
stages:
  training:
    cmd: {sys.executable} stage.py training
    deps: [stage.py]
    params: [training]
    outs: [reports/training.json: {{cache: false}}]
  evaluation:
    cmd: {sys.executable} stage.py evaluation
    deps: [stage.py, reports/training.json]
    outs: [reports/evaluation.json: {{cache: false}}]
"""


def dvc(root: Path, *words: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the queue's worker calls `dvc`
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "PATH": path, **tracking_store.IDENTITY}
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, env=env, check=True)


@pytest.mark.skipif("TEST_SERVER" not in os.environ, reason="takes a minute: `make test-server`")
def test_every_experiment_has_a_complete_pipeline_run(tmp_path, empty_store, monkeypatch):
    root = tracking_store.enter_project(tmp_path, empty_store, monkeypatch)
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(CHAIN)
    (root / "params.yaml").write_text("training:\n  steps: 1\n")
    (root / ".gitignore").write_text("/.state/\nmlflow.db*\n/mlartifacts/\n")
    tracking_store.git(root, "init", "-q")
    dvc(root, "init", "-q")
    tracking_store.git(root, "add", ".")
    tracking_store.git(root, "commit", "-qm", "x")
    for steps in (2, 3):
        dvc(root, "exp", "run", "-q", "--queue", "-n", f"queued-{steps}", "-S", f"training.steps={steps}")
    dvc(root, "queue", "start", "-j", "2")
    deadline = time.monotonic() + 150
    while len([one for one in run_folders(root) if not one.alive and len(one.stages()) == 2]) < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    dvc(root, "exp", "run", "-q", "--temp", "-n", "temporary", "-S", "training.steps=5")
    dvc(root, "exp", "run", "-q", "-n", "here", "-S", "training.steps=6")
    sync(root)
    found = {run.info.run_name: run for run in runs(root, "pipeline")}
    assert found.keys() == {"queued-2", "queued-3", "temporary", "here"}
    refs = tracking_store.git(root, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    for (name, run), steps in zip(sorted(found.items()), (6, 2, 3, 5), strict=True):
        assert run.info.status == "FINISHED", run.data.tags["mlflow.note.content"]
        assert run.data.params == {"training.steps": str(steps)}
        assert run.data.metrics == {"evaluation/loss": 1.0 / steps, "training/loss": 1.0 / steps}
        assert {what for what, _ in stage_statuses(run).values()} == {"ran (finished)"}
        commit = next(ref for ref in refs if ref.endswith(f"/{name}"))
        lock = tracking_store.git(root, "show", f"{commit}:dvc.lock") + "\n"
        assert run.data.tags["lock_sha256"] == tracking_store.sha256(lock.encode())
    dvc(root, "exp", "apply", "-q", "queued-3")
    sync(root, record_unrun=True)  # its dvc.lock has a run
    assert len(runs(root, "pipeline")) == 4
