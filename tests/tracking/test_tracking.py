"""The journal holds everything, and MLflow ends up with exactly that: nothing lost, nothing doubled."""

import gc
import getpass
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.git import git_facts, uncommitted_changes
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json
from compactgpt.tracking import mlflow_logger
from compactgpt.tracking.journal import (
    NullTracker,
    flatten,
    journal_lines,
    machine_facts,
    numbers,
    stage_metrics,
    tuned_params,
)
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.run_folder import RunFolder
from compactgpt.tracking.store import open_store
from tests.support.tracking_store import copy, git, journal, runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a b"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store)
    (root / "dvc.yaml").write_text("stages: {}")
    monkeypatch.chdir(root)
    return root


def history(root: Path, run_id: str, key: str):
    return [(m.step, m.value) for m in open_store(root).client.get_metric_history(run_id, key)]


def test_flatten_joins_keys_with_dots_and_writes_lists_as_json():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": "x"}) == {"a.b": 1, "a.c": "[1, 2]", "d": "x"}


def test_numbers_keeps_numbers_only():
    assert numbers({"a": {"b": 1, "ok": True}, "name": "x", "loss": 2.5}) == {"a.b": 1.0, "loss": 2.5}


def test_null_tracker_forgets_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = NullTracker()
    tracker.params({"a": 1})
    tracker.metrics({"a": 1.0})
    tracker.tags({"a": "b"})
    tracker.artifact(tmp_path)
    tracker.end("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_mlflow_holds_what_the_journal_said(root):
    run = journal(root)
    run.params({"model": {"n_layer": 2}})
    run.metrics({"train/loss": 3.0}, step=1)
    run.metrics({"train/loss": 2.0}, step=2)
    run.tags({"colour": "red"})
    (root / "report.json").write_text("{}")
    run.artifact(root / "report.json", "reports")
    run.end("FINISHED")
    sync(root)
    (found,) = runs(root)
    assert found.info.run_name == "training"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"model.n_layer": "2"}
    assert found.data.tags["colour"] == "red"
    assert history(root, found.info.run_id, "train/loss") == [(1, 3.0), (2, 2.0)]
    assert [f.path for f in open_store(root).client.list_artifacts(found.info.run_id, "reports")] == [
        "reports/report.json"
    ]


def test_artifacts_are_copied_as_they_were_when_logged(root):
    run = journal(root)
    path = root / "report.json"
    path.write_text("before")
    run.artifact(path)
    path.write_text("after")
    assert (run.folder / "artifacts" / "report.json").read_text() == "before"
    run.end("FINISHED")


def test_a_growing_journal_arrives_once(root):
    run = journal(root)
    run.metrics({"loss": 3.0}, step=1)
    assert not copy(root)
    run.metrics({"loss": 2.0}, step=2)
    run.end("FINISHED")
    assert copy(root)
    (found,) = runs(root)
    assert history(root, found.info.run_id, "loss") == [(1, 3.0), (2, 2.0)]


def test_a_copy_that_was_cut_off_is_repeated_without_doubling(root):
    run = journal(root)
    run.metrics({"loss": 3.0}, step=1)
    copy(root)
    (run.folder / "mlflow.json").unlink()  # killed between MLflow's answer and the note of it
    run.end("FINISHED")
    sync(root)
    (found,) = runs(root)
    assert history(root, found.info.run_id, "loss") == [(1, 3.0)]


def test_what_is_no_line_of_a_journal_is_left_out():
    odd = [b"[" * 100_000, b"\xff", b"[]", b"1", b'{"a": 1}', b""]
    assert journal_lines(b"\n".join([*odd, b'{"kind": "end"}', b""])) == [{"kind": "end"}]


def test_a_torn_last_line_waits(root):
    run = journal(root)
    with open(run.folder / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "metr')
    assert not copy(root)
    with open(run.folder / "journal.jsonl", "ab") as file:
        file.write(b'ics", "time_ms": 1, "step": 4, "values": {"loss": 1.5}}\n')
    run.end("FINISHED")
    assert copy(root)
    assert history(root, runs(root)[0].info.run_id, "loss") == [(4, 1.5)]


def test_stages_of_one_dvc_process_share_a_parent_that_ends_with_it(root):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    facts = {"pid": sleeper.pid, "created": psutil.Process(sleeper.pid).create_time(), "command": "dvc repro"}
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    for stage in ("download", "training"):
        journal(root, stage, pipeline=facts).end("FINISHED")
        assert not copy(root)  # the parent is still open
    sleeper.communicate(b"\n")
    assert copy(root)
    found = {run.data.tags["stage"]: run for run in runs(root)}
    assert sorted(found) == ["download", "pipeline", "training"]
    parent = found["pipeline"].info.run_id
    assert {run.data.tags.get("mlflow.parentRunId") for run in found.values()} == {parent, None}
    assert found["pipeline"].info.status == "FINISHED"


def test_a_killed_stage_is_closed_as_killed(root):
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from compactgpt.tracking.journal import Journal, process_facts
        run = Journal(Path(sys.argv[1]), "training", {"tags": {}, **process_facts()})
        run.metrics({"loss": 3.0}, step=1)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(root / ".state")], check=False)
    assert done.returncode == -signal.SIGKILL
    sync(root)
    (found,) = runs(root)
    assert found.info.status == "KILLED"
    assert history(root, found.info.run_id, "loss") == [(1, 3.0)]


def test_a_run_goes_to_the_store_that_it_was_meant_for_and_to_no_other(root, monkeypatch):
    journal(root, "download").end("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    journal(root, "training").end("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: no server listens
    journal(root, "evaluation").end("FINISHED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    begin = time.monotonic()
    with pytest.raises(
        Unreachable, match=r"http://127\.0\.0\.1:9 failed \(Connection refused\).*compactgpt sync"
    ):
        sync(root)
    assert time.monotonic() - begin < 15
    assert [run.info.run_name for run in runs(root)] == ["download"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    assert [run.info.run_name for run in runs(root)] == ["training"]


def test_a_server_that_accepts_and_never_answers_is_given_up_within_seconds(root, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        journal(root).end("FINISHED")
        begin = time.monotonic()
        with pytest.raises(Unreachable, match="timed out") as caught:
            sync(root)
    assert time.monotonic() - begin < 15
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "foo://bar", "mlruns"])
def test_an_address_that_takes_no_runs_is_named_at_once(root, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(BadConfig, match=f"MLFLOW_TRACKING_URI is '{re.escape(uri)}', allowed are"):
        journal(root)
    with pytest.raises(BadConfig):
        sync(root)


def test_the_experiment_is_the_one_that_the_environment_names(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run = journal(root)
    run.end("FINISHED")
    first = json.loads((run.folder / "journal.jsonl").read_text().splitlines()[0])
    assert first["store"] == {"uri": "sqlite:///mlflow.db", "experiment": "mine", "experiment_id": ""}
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    sync(root)
    client = open_store(root).client
    mine = client.get_experiment_by_name("mine").experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    journal(root, "evaluation").end("FINISHED")
    sync(root)
    assert [run.info.run_name for run in client.search_runs([mine])] == ["evaluation", "training"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "99")
    with pytest.raises(Unreachable, match="No Experiment with id=99 exists"):
        open_store(root)


def test_a_damaged_database_is_named_with_what_to_do_and_its_runs_are_copied_again(root):
    run = journal(root)
    run.metrics({"train/loss": 3.0}, step=1)
    run.end("FINISHED")
    sync(root)
    content = (root / "mlflow.db").read_bytes()
    for damaged in (b"no database" * 400, content[: len(content) // 2]):
        for path in root.glob("mlflow.db*"):
            path.unlink()
        (root / "mlflow.db").write_bytes(damaged)
        with pytest.raises(BadData, match=r"mlflow.db is damaged .*`mv mlflow.db mlflow.db.damaged`"):
            sync(root)
    (root / "mlflow.db").rename(root / "mlflow.db.damaged")
    root = root.rename(root.with_name("moved"))  # MLflow caches the tables that an address has
    sync(root)
    (found,) = runs(root)
    assert history(root, found.info.run_id, "train/loss") == [(1, 3.0)]


def test_a_deleted_database_is_filled_again_from_the_journals(root):
    run = journal(root)
    run.metrics({"train/loss": 3.0}, step=1)
    run.end("FINISHED")
    sync(root)
    (before,) = runs(root)
    for path in root.glob("mlflow.db*"):
        path.unlink()
    root = root.rename(root.with_name("moved"))  # MLflow caches the tables that an address has
    sync(root)
    (after,) = runs(root)
    assert after.info.run_id != before.info.run_id
    assert (after.info.start_time, after.info.end_time) == (before.info.start_time, before.info.end_time)
    assert history(root, after.info.run_id, "train/loss") == [(1, 3.0)]


def test_a_copied_repository_writes_nothing_into_the_original(root, tmp_path, monkeypatch):
    (root / "report.json").write_text("{}")
    run = journal(root)
    run.artifact(root / "report.json")
    run.end("FINISHED")
    sync(root)
    held = sorted((root / "mlartifacts").rglob("*.json"))
    assert held
    clone = tmp_path / "clone"
    shutil.copytree(root, clone)
    monkeypatch.chdir(clone)
    run = journal(clone, "evaluation")
    run.artifact(root / "report.json")
    run.end("FINISHED")
    sync(clone)
    assert sorted((root / "mlartifacts").rglob("*.json")) == held
    assert len(list((clone / "mlartifacts").rglob("*.json"))) == len(held) + 1


def test_a_run_has_user_source_and_times_as_mlflow_sets_them(root):
    journal(root).end("FINISHED")
    sync(root)
    (found,) = runs(root)
    tags = found.data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("stages/training.py", "LOCAL")
    experiment = open_store(root).client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.note.content"].startswith("A run is one `dvc repro`")


def test_sync_outside_of_a_project_says_so_and_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInput, match="run from the repository folder"):
        sync(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_of_a_version_that_named_no_store_is_left_out(root):
    done = root / ".state/tracking/done/20261101T000000-training"
    done.mkdir(parents=True)
    line = {"kind": "start", "stage": "training", "pid": 1, "created": 1.0, "tags": {}}
    (done / "journal.jsonl").write_text(json.dumps(line) + "\n")
    journal(root).end("FINISHED")
    sync(root)
    assert [run.info.status for run in runs(root)] == ["FINISHED"]


def test_the_child_process_copies_a_run_and_ends(root):
    run = journal(root)
    run.metrics({"train/loss": 3.0}, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it outlives its parent on purpose
        mlflow_logger.start_logger(run.run_folder)
        gc.collect()
    run.end("FINISHED")
    sync(root)  # waits for it
    assert [one.info.status for one in runs(root)] == ["FINISHED"]


def test_the_log_of_the_child_process_is_bounded(root, monkeypatch):
    run = journal(root)
    monkeypatch.setattr(mlflow_logger.subprocess, "Popen", lambda *_, **__: None)
    (run.run_folder / "log").write_bytes(b"x" * (mlflow_logger.MAX_LOG + 1))
    mlflow_logger.start_logger(run.run_folder)
    assert (run.run_folder / "log").stat().st_size == 0
    run.end("FINISHED")


def test_only_one_process_copies(root):
    run = journal(root)
    folder = RunFolder(run.run_folder)
    with folder.locked() as first, folder.locked() as second:
        assert (first, second) == (True, False)
    run.end("FINISHED")


@pytest.fixture
def committed(tmp_path):
    """A repository with one commit, a report in it, and an ignored file."""
    for path in ("src/code.py", "reports/x.json", ".gitignore"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("secret\n")
    for words in [["init", "-q"], ["add", "."], ["commit", "-qm", "x"]]:
        git(tmp_path, *words)
    return tmp_path


def test_git_facts_name_the_commit_and_whether_it_is_dirty(committed, tmp_path_factory):
    assert git_facts(tmp_path_factory.mktemp("none")) == {}
    clean = git_facts(committed)
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (committed / "reports/x.json").write_text("what a stage writes is no change of ours")
    assert git_facts(committed)["git.dirty"] == "false"
    (committed / "src/code.py").write_text("2")
    assert git_facts(committed)["git.dirty"] == "true"


def test_the_uncommitted_changes_make_the_work_tree_out_of_the_commit(committed, tmp_path):
    (committed / "src/code.py").write_bytes(b"changed\x00\xff\r\n")
    (committed / "src/new.py").write_text("new")
    (committed / "src/secret").write_text("ignored by git")
    (committed / "notes.txt").write_text("somebody's own")
    (committed / "patch").write_bytes(uncommitted_changes(committed).diff)
    git(committed, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"), "HEAD")
    git(tmp_path / "tree", "apply", "--binary", str(committed / "patch"))
    assert (tmp_path / "tree/src/code.py").read_bytes() == b"changed\x00\xff\r\n"
    assert (tmp_path / "tree/src/new.py").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "tree").iterdir()) == [
        ".git",
        ".gitignore",
        "reports",
        "src",
    ]
    assert sorted(path.name for path in (tmp_path / "tree/src").iterdir()) == ["code.py", "new.py"]


def test_metrics_are_figures_of_a_model_in_groups_and_counts_stay_in_the_report():
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
    for stage in ("download", "tokenization", "comparison"):
        assert stage_metrics(stage, report) == {}


@pytest.mark.parametrize("report", ["evaluation", "baseline/smollm2-135m"])
def test_a_stage_logs_about_ten_metrics(report):
    stage = report.replace("/", "@")
    found = stage_metrics(stage, read_json(ROOT / f"reports/{report}.json"))
    assert 5 <= len(found) <= 12


def test_what_people_tune_comes_first_and_versions_of_packages_are_one_parameter():
    names = list(tuned_params(read_yaml(ROOT / "params.yaml")))
    assert names[0].startswith("training.")
    assert [name for name in names if "distributions" in name] == ["download.docstrings.distributions"]
    assert not [name for name in names if name.startswith(("estimate", "regression"))]


def test_machine_facts_name_what_rounds_sums(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # of conftest.py
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("HF_TOKEN", "never logged")
    facts = machine_facts()
    assert facts["torch"].startswith("2.")
    assert facts["arithmetic"] == '{"ATEN_CPU_CAPABILITY": "default"}'
    assert "never logged" not in str(facts)


def test_data_is_named_by_hash_once_however_often_it_is_copied(root):
    run = journal(root)
    digest = "ab" * 32
    run.inputs([{"name": "val.tokens", "digest": digest, "source": "data/tokens", "context": "evaluation"}])
    copy(root)
    (run.folder / "mlflow.json").unlink()
    run.end("FINISHED")
    sync(root)
    (data,) = runs(root)[0].inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("val.tokens", digest[:36])
    assert json.loads(data.dataset.profile)["sha256"] == digest
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "evaluation")]


def test_a_running_stage_is_watched_from_outside(root, monkeypatch):
    monkeypatch.setattr("compactgpt.tracking.system_metrics.SAMPLE_SECONDS", 0.0)
    run = journal(root)
    for _ in range(3):
        assert not copy(root)
    run.end("FINISHED")
    assert copy(root)
    (found,) = runs(root)
    assert found.data.metrics["system/stage_memory_megabytes"] > 50  # this process
    assert 0 <= found.data.metrics["system/system_memory_usage_percentage"] <= 100
    assert (
        len(open_store(root).client.get_metric_history(found.info.run_id, "system/stage_cpu_percentage")) >= 2
    )


def test_every_journal_line_is_one_json_object(root):
    run = journal(root)
    run.params({"text": "two\nlines"})
    run.end("FAILED")
    lines = (run.folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["start", "params", "end"]


def test_the_rest_of_an_interrupted_run_continues_the_same_run_without_doubled_steps(root):
    note = root / "state" / "journal"
    first = journal(root, held=True)
    first.params({"a": 1})
    assert not (first.folder / "journal.jsonl").read_text()
    first.begin(note)
    for step in (1, 2, 3):
        first.metrics({"loss": 4.0 - step}, step)
    first.end("KILLED")
    sync(root)
    for last in (5, 6):  # interrupted twice; the state on disk is of step 2 both times
        rest = journal(root, held=True)
        rest.params({"a": 2})
        rest.begin(note)
        for step in range(3, last + 1):
            rest.metrics({"loss": 4.0 - step, "val": 1.0}, step)
        if last == 5:
            assert not copy(root)
            assert runs(root)[0].info.status == "RUNNING"
        rest.metrics({"report": 2.5})
        rest.end("FINISHED")
    sync(root)
    (found,) = runs(root)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"a": "1"}
    assert history(root, found.info.run_id, "loss") == [(step, 4.0 - step) for step in range(1, 7)]
    assert [step for step, _ in history(root, found.info.run_id, "val")] == [3, 4, 5, 6]


def test_a_held_journal_that_ends_before_it_begins_is_a_run_of_its_own(root):
    run = journal(root, held=True)
    run.end("FAILED")
    sync(root)
    assert runs(root)[0].info.status == "FAILED"
