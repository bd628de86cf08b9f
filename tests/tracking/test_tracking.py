"""A journal has everything that a stage logs, and MLflow gets each line of the journal once."""

import gc
import getpass
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, MissingInput, Unreachable
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json
from compactgpt.tracking import mlflow_logger
from compactgpt.tracking.journal import machine_facts, stage_metrics, tuned_params
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import RunFolder
from compactgpt.tracking.store import open_store
from tests.support.tracking_store import copy, enter_project, git, history, journal, runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    return enter_project(tmp_path / "a b", empty_store, monkeypatch)


def log_run(root: Path) -> None:
    """Log a run with two losses and a report."""
    run = journal(root)
    run.params({"model": {"n_layer": 2}})
    for step in (1, 2):
        run.metrics({"train/loss": 4.0 - step}, step)
    (root / "report.json").write_text("{}")
    run.artifact(root / "report.json", "reports")
    run.end("FINISHED")


def test_mlflow_has_what_the_journal_has_as_start_run_would_log_it(root):
    log_run(root)
    (root / "report.json").write_text("changed after it was logged")
    sync(root)
    (found,) = runs(root)
    assert (found.info.run_name, found.info.status) == ("training", "FINISHED")
    assert found.data.params == {"model.n_layer": "2"}
    assert history(root, found, "train/loss") == [(1, 3.0), (2, 2.0)]
    tags = [found.data.tags[f"mlflow.{key}"] for key in ("user", "source.name", "source.type")]
    assert tags == [getpass.getuser(), "stages/training.py", "LOCAL"]
    client = open_store(root).client
    assert Path(client.download_artifacts(found.info.run_id, "reports/report.json")).read_text() == "{}"
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.note.content"].startswith("A run is one `dvc repro`")


def test_a_growing_journal_is_logged_once_even_if_a_copy_of_it_was_cut_off(root):
    run = journal(root)
    data = {"name": "val.tokens", "digest": "ab" * 32, "source": "data/tokens", "context": "evaluation"}
    run.inputs([data])
    run.metrics({"loss": 3.0}, 1)
    with open(run.folder / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "metr')  # an incomplete line waits for its end
        file.flush()
        assert not copy(root)
        file.write(b'ics", "time_ms": 1, "step": 2, "values": {"loss": 1.5}}\n')
    assert not copy(root)  # another process, which starts with the first line again
    run.end("FINISHED")
    assert copy(root)
    (found,) = runs(root)
    assert history(root, found, "loss") == [(1, 3.0), (2, 1.5)]
    (logged,) = found.inputs.dataset_inputs
    assert (logged.dataset.name, json.loads(logged.dataset.profile)["sha256"]) == ("val.tokens", "ab" * 32)


def test_a_killed_stage_is_closed_as_killed(root):
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from compactgpt.tracking.journal import Journal, process_facts; "
        "run = Journal(Path(sys.argv[1]), 'training', {'tags': {}, **process_facts()}); "
        "run.metrics({'loss': 3.0}, step=1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root / ".state")], check=False)
    assert done.returncode == -signal.SIGKILL
    sync(root)
    (found,) = runs(root)
    assert (found.info.status, history(root, found, "loss")) == ("KILLED", [(1, 3.0)])


def test_a_run_is_copied_to_the_store_that_its_journal_names_and_to_no_other(root, monkeypatch):
    journal(root, "download").end("FINISHED")
    for stage, uri in [("training", f"sqlite:///{root}/other.db"), ("evaluation", "http://127.0.0.1:9")]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # no server listens on the discard port
        journal(root, stage).end("FINISHED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    refused = r"http://127\.0\.0\.1:9 failed \(Connection refused\).*compactgpt sync"
    with pytest.raises(Unreachable, match=refused):
        sync(root)
    assert [run.info.run_name for run in runs(root)] == ["download"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    assert [run.info.run_name for run in runs(root)] == ["training"]


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "foo://bar"])
def test_an_address_that_can_hold_no_runs_is_refused_at_once(root, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(BadConfig, match=f"MLFLOW_TRACKING_URI is '{re.escape(uri)}', allowed are"):
        journal(root)


def test_the_experiment_is_the_one_that_the_environment_names(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    journal(root).end("FINISHED")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    sync(root)
    client = open_store(root).client
    mine = client.get_experiment_by_name("mine").experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    journal(root, "evaluation").end("FINISHED")
    sync(root)
    assert [run.info.run_name for run in client.search_runs([mine])] == ["evaluation", "training"]


def write_no_database(path: Path) -> None:
    path.write_bytes(b"no database" * 400)


def write_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")


DAMAGES = pytest.mark.parametrize(
    ("damage", "reason"), [(write_no_database, "file is not a database"), (write_version, "db upgrade")]
)


@DAMAGES
def test_a_database_that_mlflow_cannot_read_is_one_sentence(root, damage, reason):
    log_run(root)
    damage(root / "mlflow.db")
    error = rf"^MLflow at sqlite:\S*mlflow.db failed .*{reason}.*: no run is lost[^\n]*$"
    with pytest.raises(Unreachable, match=error):
        sync(root)


@DAMAGES
@pytest.mark.parametrize(
    "command", ["trace compact.loss", "gate --against champion", "reproduce 0123abcd", "diff 0123abcd"]
)
def test_commands_that_read_mlflow_say_in_one_sentence_that_they_cannot(root, damage, reason, command):
    for folder in (".dvc", "reports"):
        (root / folder).mkdir()
    for name in ("dvc.lock", "dvc.yaml", "params.yaml", "reports/evidence.json"):
        shutil.copyfile(ROOT / name, root / name)
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "first")
    damage(root / "mlflow.db")
    done = CliRunner().invoke(app, command.split())
    error = rf"error: MLflow at sqlite:\S*mlflow.db failed .*{reason}.*: no run is lost[^\n]*\n"
    assert done.exit_code == Unreachable.exit_code, done.output
    assert re.fullmatch(error, done.output), done.output


def test_sync_with_warn_ends_well_without_mlflow(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server listens on the discard port
    journal(root).end("FINISHED")
    failed = "MLflow at http://127.0.0.1:9 failed (Connection refused): no run is lost."
    for option, exit_code, kind in (([], Unreachable.exit_code, "error"), (["--warn"], 0, "warning")):
        done = CliRunner().invoke(app, ["sync", *option])
        *_, line = done.output.splitlines()
        assert (done.exit_code, line.startswith(f"{kind}: {failed}")) == (exit_code, True), done.output


def test_a_deleted_database_is_filled_again_from_the_journals(root):
    log_run(root)
    sync(root)
    (before,) = runs(root)
    (root / "mlflow.db").unlink()
    root = root.rename(root.with_name("moved"))  # MLflow caches the tables that an address has
    sync(root)
    (after,) = runs(root)
    assert (after.info.start_time, after.info.end_time) == (before.info.start_time, before.info.end_time)
    assert history(root, after, "train/loss") == [(1, 3.0), (2, 2.0)]


def test_a_copied_repository_writes_nothing_into_the_original(root, tmp_path, monkeypatch):
    log_run(root)
    sync(root)
    held = sorted((root / "mlartifacts").rglob("*.json"))
    clone = shutil.copytree(root, tmp_path / "clone")
    monkeypatch.chdir(clone)
    log_run(clone)
    sync(clone)
    assert sorted((root / "mlartifacts").rglob("*.json")) == held
    assert len(list((clone / "mlartifacts").rglob("*.json"))) == len(held) + 1 > 1


def test_sync_outside_of_a_project_says_so_and_creates_nothing(tmp_path):
    with pytest.raises(MissingInput, match="run from the repository folder"):
        sync(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_child_process_copies_a_run_with_system_metrics_and_ends(root, monkeypatch):
    run = journal(root)
    with RunFolder(run.run_folder).locked() as first, RunFolder(run.run_folder).locked() as second:
        assert (first, second) == (True, False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it outlives its parent on purpose
        mlflow_logger.start_logger(run.run_folder)
        gc.collect()
    deadline = time.monotonic() + 60
    while not (found := runs(root)) or not found[0].data.metrics:
        assert time.monotonic() < deadline, (run.run_folder / "log").read_text()
        time.sleep(0.3)
    run.end("FINISHED")
    sync(root)  # waits for it
    (found,) = runs(root)
    assert found.info.status == "FINISHED"
    assert 0 < found.data.metrics["system/system_memory_usage_percentage"] <= 100


def test_only_figures_of_a_model_and_parameters_that_change_it_are_logged():
    report = {
        "loss": {"value": 2.0, "low": 1.0, "high": 3.0},
        "model": {"num_params": 7},
        "tasks": {"cloze": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}, "items": 50}},
        "views": {"strided": {"perplexity": {"value": 7.0}, "context": 4}},
        "text": {"settings": {"seed": 1}, "statistics": {"greedy": {"loop_rate": {"value": 1.5}}}},
    }
    figures = {"loss": 2.0, "cloze_accuracy": 0.5, "perplexity_strided": 7.0, "loop_rate": 1.5}
    for stage, group in [("evaluation", "eval"), ("baseline@xz", "baselines/xz")]:
        assert stage_metrics(stage, report) == {f"{group}/{key}": value for key, value in figures.items()}
    assert stage_metrics("training", {"best_val_loss": 3.0, "steps": 4}) == {"val/best_loss": 3.0}
    assert 5 <= len(stage_metrics("evaluation", read_json(ROOT / "reports/evaluation.json"))) <= 12
    names = list(tuned_params(read_yaml(ROOT / "params.yaml")))
    assert [name for name in names if "distributions" in name] == ["download.docstrings.distributions"]
    assert not [name for name in names if name.startswith(("estimate", "regression"))]


def test_machine_facts_name_what_rounds_sums(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # of conftest.py
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    facts = machine_facts()
    assert facts["torch"].startswith("2.")
    assert facts["arithmetic"] == '{"ATEN_CPU_CAPABILITY": "default"}'
