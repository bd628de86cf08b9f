"""The journal tells everything, and MLflow ends up with exactly that: nothing lost, nothing doubled."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from compactgpt import syncing
from compactgpt.common.git import git_facts, uncommitted
from compactgpt.syncing import Syncer, drain, tracking_folder
from compactgpt.tracking import (
    NullTracker,
    flatten,
    grouped,
    journal_lines,
    machine_facts,
    numbers,
)
from tests.store import git, journal, runs


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a b"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store)
    return root


def history(root: Path, run_id: str, key: str):
    return [(m.step, m.value) for m in Syncer(root).connect()[0].get_metric_history(run_id, key)]


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
    assert drain(root)
    (found,) = runs(root)
    assert found.info.run_name == "training"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"model.n_layer": "2"}
    assert found.data.tags["colour"] == "red"
    assert history(root, found.info.run_id, "train/loss") == [(1, 3.0), (2, 2.0)]
    assert [f.path for f in Syncer(root).connect()[0].list_artifacts(found.info.run_id, "reports")] == [
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
    run, syncer = journal(root), Syncer(root)
    run.metrics({"loss": 3.0}, step=1)
    assert not syncer.sync()
    run.metrics({"loss": 2.0}, step=2)
    run.end("FINISHED")
    assert syncer.sync()
    (found,) = runs(root)
    assert history(root, found.info.run_id, "loss") == [(1, 3.0), (2, 2.0)]


def test_a_copy_that_was_cut_off_is_repeated_without_doubling(root):
    run = journal(root)
    run.metrics({"loss": 3.0}, step=1)
    Syncer(root).sync()
    (run.folder / "synced.json").unlink()  # killed between MLflow's answer and the note of it
    run.end("FINISHED")
    assert drain(root)
    (found,) = runs(root)
    assert history(root, found.info.run_id, "loss") == [(1, 3.0)]


def test_what_is_no_line_of_a_journal_is_left_out():
    odd = [b"[" * 100_000, b"\xff", b"[]", b"1", b'{"a": 1}', b""]
    assert journal_lines(b"\n".join([*odd, b'{"kind": "end"}', b""])) == [{"kind": "end"}]


def test_a_torn_last_line_waits(root):
    run = journal(root)
    with open(run.folder / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "metr')
    syncer = Syncer(root)
    assert not syncer.sync()
    with open(run.folder / "journal.jsonl", "ab") as file:
        file.write(b'ics", "time_ms": 1, "step": 4, "values": {"loss": 1.5}}\n')
    run.end("FINISHED")
    assert syncer.sync()
    assert history(root, runs(root)[0].info.run_id, "loss") == [(4, 1.5)]


def test_stages_of_one_dvc_process_share_a_parent_that_ends_with_it(root):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    pipeline = {"pid": sleeper.pid, "created": psutil.Process(sleeper.pid).create_time()}
    syncer = Syncer(root)
    for stage, tags in [("download", {}), ("training", {"data_sha256": "abc"})]:
        journal(root, stage, pipeline=pipeline, tags=tags).end("FINISHED")
        assert not syncer.sync()  # the parent is still open
    sleeper.communicate(b"\n")
    fresh = Syncer(root)  # as after a crash of the first: it must take over the open parent
    assert fresh.sync()
    found = {run.data.tags["stage"]: run for run in runs(root)}
    assert sorted(found) == ["download", "pipeline", "training"]
    parent = found["pipeline"].info.run_id
    assert {run.data.tags.get("mlflow.parentRunId") for run in found.values()} == {parent, None}
    assert found["pipeline"].info.status == "FINISHED"
    assert found["pipeline"].data.tags["data_sha256"] == "abc"


def test_a_killed_stage_is_closed_as_killed(root):
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from compactgpt.syncing import process_facts
        from compactgpt.tracking import Journal
        run = Journal(Path(sys.argv[1]), "training", {"tags": {}, **process_facts()})
        run.metrics({"loss": 3.0}, step=1)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(root / ".state")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert drain(root)
    (found,) = runs(root)
    assert found.info.status == "KILLED"
    assert history(root, found.info.run_id, "loss") == [(1, 3.0)]


def test_a_server_that_refuses_loses_nothing(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = journal(root)
    run.metrics({"loss": 3.0}, step=1)
    run.end("FINISHED")
    with pytest.raises(Exception, match=r"(?i)connection|retries"):
        Syncer(root).sync()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert drain(root)
    assert history(root, runs(root)[0].info.run_id, "loss") == [(1, 3.0)]


def test_only_one_process_copies(root):
    folder = tracking_folder(root)
    folder.mkdir(parents=True)
    with syncing._lock(folder) as first, syncing._lock(folder) as second:
        assert (first, second) == (True, False)


@pytest.fixture
def committed(tmp_path):
    """A repository with one commit, a report in it, and an ignored file."""
    for path in ("src/code.py", "reports/x.json", ".gitignore"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("secret\n")
    for words in [["init", "-q"], ["add", "."], ["commit", "-qm", "x"]]:
        git(tmp_path, *words)
    return tmp_path


def test_git_facts_name_the_commit_and_tell_dirty_from_clean(committed, tmp_path_factory):
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
    (committed / "patch").write_bytes(uncommitted(committed))
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


def test_names_are_grouped_alike_for_every_model():
    report = {
        "loss": {"value": 2.0, "low": 1.0, "high": 3.0},
        "model": {"num_params": 7},
        "tasks": {"cloze": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}}},
        "text": {"settings": {"seed": 1}, "statistics": {"greedy": {"zipf": {"value": 1.5}}}},
    }
    assert grouped("evaluation", report) == grouped("baseline", report) == {
        "eval/loss": 2.0,
        "eval/bounds/loss.low": 1.0,
        "eval/bounds/loss.high": 3.0,
        "eval/model/num_params": 7.0,
        "eval/tasks/cloze.accuracy": 0.5,
        "eval/bounds/tasks/cloze.accuracy.low": 0.1,
        "eval/bounds/tasks/cloze.accuracy.high": 0.9,
        "eval/text/greedy.zipf": 1.5,
    }  # fmt: skip
    assert grouped("download", {"documents": 3}) == {"download/documents": 3.0}
    assert grouped("training", {"val_loss": 3.0}) == {"train/final/val_loss": 3.0}


def test_machine_facts_tell_what_rounds_sums(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # of conftest.py
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("HF_TOKEN", "never told")
    facts = machine_facts()
    assert facts["torch"].startswith("2.")
    assert facts["arithmetic"] == '{"ATEN_CPU_CAPABILITY": "default"}'
    assert "never told" not in str(facts)


def test_data_is_named_by_hash_once_however_often_it_is_copied(root):
    run = journal(root)
    digest = "ab" * 32
    run.inputs([{"name": "val.tokens", "digest": digest, "source": "data/tokens", "context": "evaluation"}])
    Syncer(root).sync()
    (run.folder / "synced.json").unlink()
    run.end("FINISHED")
    assert drain(root)
    (data,) = runs(root)[0].inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("val.tokens", digest[:36])
    assert json.loads(data.dataset.profile)["sha256"] == digest
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "evaluation")]


def test_a_running_stage_is_watched_from_outside(root, monkeypatch):
    monkeypatch.setattr("compactgpt.gauges.SAMPLE_SECONDS", 0.0)
    run, syncer = journal(root), Syncer(root)
    for _ in range(3):
        assert not syncer.sync()
    run.end("FINISHED")
    assert syncer.sync()
    (found,) = runs(root)
    assert found.data.metrics["system/stage_memory_megabytes"] > 50  # this process
    assert 0 <= found.data.metrics["system/system_memory_usage_percentage"] <= 100
    assert (
        len(Syncer(root).connect()[0].get_metric_history(found.info.run_id, "system/stage_cpu_percentage"))
        >= 2
    )


def test_every_journal_line_is_one_json_object(root):
    run = journal(root)
    run.params({"text": "two\nlines"})
    run.end("FAILED")
    lines = (run.folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["start", "params", "end"]


def test_the_rest_of_an_interrupted_run_goes_on_in_the_same_run_without_doubled_steps(root):
    note = root / "state" / "journal"
    first = journal(root, held=True)
    first.params({"a": 1})
    assert not (first.folder / "journal.jsonl").read_text()
    first.begin(note)
    for step in (1, 2, 3):
        first.metrics({"loss": 4.0 - step}, step)
    first.end("KILLED")
    assert drain(root)
    for last in (5, 6):  # interrupted twice; the state on disk is of step 2 both times
        rest = journal(root, held=True)
        rest.params({"a": 2})
        rest.begin(note)
        for step in range(3, last + 1):
            rest.metrics({"loss": 4.0 - step, "val": 1.0}, step)
        if last == 5:
            assert not Syncer(root).sync()
            assert runs(root)[0].info.status == "RUNNING"
        rest.metrics({"report": 2.5})
        rest.end("FINISHED")
    assert drain(root)
    (found,) = runs(root)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"a": "1"}
    assert history(root, found.info.run_id, "loss") == [(step, 4.0 - step) for step in range(1, 7)]
    assert [step for step, _ in history(root, found.info.run_id, "val")] == [3, 4, 5, 6]


def test_a_held_journal_that_ends_before_it_begins_is_a_run_of_its_own(root):
    run = journal(root, held=True)
    run.end("FAILED")
    assert drain(root)
    assert runs(root)[0].info.status == "FAILED"
