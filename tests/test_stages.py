"""Doors: a mistake is one sentence and an exit code, never a traceback; two never do one stage's work."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compactgpt.cli import app as commands
from compactgpt.common.console import ProgressBar
from compactgpt.common.errors import BadData, Busy, UserError
from compactgpt.common.storage import write_json
from stages import _runner

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository folder with the project's params.yaml, not under DVC."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def run(work, params: Path = Path("params.yaml"), tracker: str = "none"):
    app = _runner.new_app()

    @app.command()
    def main() -> None:
        with _runner.open_stage("training", params, tracker, ("model",)) as stage:
            work(stage)

    return CliRunner().invoke(app)


def fail_with(error):
    def work(_stage):
        raise error

    return work


@pytest.mark.parametrize("kind", [*UserError.__subclasses__(), UserError])
def test_a_users_mistake_is_one_sentence_and_its_exit_code(here, kind):
    result = run(fail_with(kind("the file x is empty: write something")))
    assert result.exit_code == kind.exit_code
    assert result.output == "error: the file x is empty: write something\n"


def test_a_full_disk_is_one_sentence(here):
    result = run(fail_with(OSError(errno.ENOSPC, "No space left on device", "data/x")))
    assert result.exit_code == 73
    assert result.output == "error: no space left on the disk (data/x): free some space and run again\n"


def test_a_bug_of_ours_is_not_hidden(here):
    result = run(fail_with(ZeroDivisionError("boom")))
    assert isinstance(result.exception, ZeroDivisionError)


def test_bad_params_are_refused_before_any_work(here):
    text = (here / "params.yaml").read_text().replace("  n_head: 4", "  n_haed: 4")
    (here / "params.yaml").write_text(text)
    worked = []
    result = run(worked.append)
    assert result.exit_code == 78
    assert "model.n_haed" in result.output
    assert "did you mean n_head" in result.output
    assert not worked


def test_an_unknown_tracker_is_refused(here):
    result = run(lambda stage: None, tracker="wandb")
    assert result.exit_code == 2
    assert "mlflow or none" in result.output


def test_a_report_is_stable_json(here):
    run(lambda stage: stage.report(Path("reports/x.json"), {"b": 1, "a": 0.1}))
    assert (here / "reports/x.json").read_text() == '{\n  "a": 0.1,\n  "b": 1\n}\n'


def test_a_second_run_of_a_stage_is_told_who_works(here):
    with _runner._only_one("training"):
        result = run(lambda stage: None)
    assert result.exit_code == Busy.exit_code
    assert f"process {os.getpid()}" in result.output
    assert run(lambda stage: None).exit_code == 0


def test_under_dvc_a_stage_keeps_dvc_lock_as_it_found_it(here, monkeypatch):
    Path("dvc.lock").write_text("schema: '2.0'\n")
    assert run(lambda stage: None).exit_code == 0
    assert not Path(".dvc").exists()
    monkeypatch.setenv("DVC_STAGE", "a")
    assert run(lambda stage: None).exit_code == 0
    Path("dvc.lock").write_text("")
    assert CliRunner().invoke(commands, ["repair"]).output.startswith("dvc.lock was incomplete")
    assert Path("dvc.lock").read_text() == "schema: '2.0'\n"
    assert CliRunner().invoke(commands, ["mend"]).output == ""  # the old name


def test_the_journal_tells_params_metrics_and_the_end(here, monkeypatch):
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda folder: None)
    run(lambda stage: stage.report(Path("x.json"), {"best_val_loss": 2.0}), tracker="mlflow")
    (folder,) = (here / ".state/tracking").glob("*/*-training-*")
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    kinds = ["start", "params", "metrics", "artifact", "end"]
    assert [line["kind"] for line in lines] == kinds
    assert lines[1]["values"]["model.n_layer"] > 0
    assert lines[2]["values"] == {"val/best_loss": 2.0}
    assert (folder.parent / "before/params.yaml").exists()
    assert lines[-1]["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(BadData("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Busy("x"), "KILLED")]
)
def test_the_journal_tells_how_a_run_failed(here, monkeypatch, error, status):
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda folder: None)
    run(fail_with(error), tracker="mlflow")
    (path,) = (here / ".state/tracking").glob("*/*/journal.jsonl")
    assert json.loads(path.read_text().splitlines()[-1])["status"] == status


def test_sigterm_ends_a_stage_and_frees_its_lock(here):
    code = """
import sys, time
from pathlib import Path
from stages import _runner
with _runner.open_stage("training", Path("params.yaml"), "none"):
    print("ready", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == 143
    with _runner._only_one("training"):
        pass


def test_a_sigterm_as_the_interpreter_leaves_changes_neither_exit_code_nor_words(here):
    code = (
        "import atexit, os, signal, sys; from pathlib import Path; "
        f"sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT)!r}]; from stages import _runner; "
        "from compactgpt.common.errors import Busy; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "with _runner.open_stage('training', Path('params.yaml'), 'none'):\n"
        "    raise Busy('stopped at step 3')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == Busy.exit_code
    assert done.stderr == "error: stopped at step 3\n"


def test_a_bar_prints_plain_lines_where_there_is_no_terminal(capsys):
    bar = ProgressBar("training", "tokens")
    bar(1000, 2000, {"loss": "5.1"})
    bar(1500, 2000)
    bar(2000, 2000)
    assert capsys.readouterr().err == (
        "training: 1,000 of 2,000 tokens, loss 5.1\ntraining: 2,000 of 2,000 tokens\n"
    )


class Terminal(io.StringIO):
    """A place that says it is a terminal."""

    def isatty(self):
        return True


def test_on_a_terminal_a_bar_is_drawn_in_place_and_begins_anew_with_the_next_work(monkeypatch):
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    bar = ProgressBar("training", "tokens")
    for done in (500, 2000):
        bar(done, 2000, {"loss": "5.1"})
    assert "training: 100%" in shown.getvalue()
    assert "2.00k/2.00k" in shown.getvalue()
    assert "loss=5.1" in shown.getvalue()
    assert shown.getvalue().count("\n") == 1
    bar(10, 40)
    assert shown.getvalue().rpartition("\n")[2].count("/40.0") == 1


def test_ctrl_c_says_how_to_go_on(here):
    result = run(fail_with(KeyboardInterrupt()))
    assert (result.exit_code, result.output) == (130, "error: stopped; `dvc repro` resumes from here\n")


def test_exit_from_a_stage_is_kept(here):
    assert run(fail_with(typer.Exit(5))).exit_code == 5


@pytest.mark.parametrize(("name", "splits"), [("training", 2), ("baseline@xz", 1), ("download", 0)])
def test_a_run_names_the_token_files_that_it_reads(here, monkeypatch, name, splits):
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda folder: None)
    files = {f"{split}.tokens": {"sha256": "a" * 64, "bytes": 9} for split in ("train", "val")}
    write_json(here / "data/tokens/manifest.json", {"files": files})
    with _runner.open_stage(name, Path("params.yaml"), "mlflow"):
        pass
    (path,) = (here / ".state/tracking").glob("*/*/journal.jsonl")
    inputs = [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "inputs"]
    assert [len(line["datasets"]) for line in inputs] == [splits] * bool(splits)
