"""Stage scripts: a mistake of the user is one sentence and an exit code; a stage never runs twice at once."""

import errno
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
from typer.testing import CliRunner

from compactgpt.cli import app as commands
from compactgpt.common.errors import BadData, Busy, CheckFailed, UserError
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json, write_json
from compactgpt.tracking.dvc_files import is_ignored, open_repo, params_sha256, value_at
from stages import _runner

ROOT = Path(__file__).parents[1]


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def replace(path, old, new):
    text = Path(path).read_text()
    assert text.count(old) == 1
    Path(path).write_text(text.replace(old, new))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A repository folder with the project's params.yaml, not under DVC; no child process copies journals."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def run(work=lambda stage: None, tracker="none"):
    """Run a stage script that only calls `work`."""
    app = _runner.new_app()

    @app.command()
    def main() -> None:
        with _runner.open_stage("training", tracker, ("model",)) as stage:
            work(stage)

    return CliRunner().invoke(app)


def journal_lines(here: Path) -> list[dict]:
    (path,) = here.glob(".state/tracking/*/*/journal.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("error", "exit_code", "message", "status"),
    [
        *((kind("x"), kind.exit_code, "error: x\n", "FAILED") for kind in (UserError, BadData, CheckFailed)),
        (Busy("x"), Busy.exit_code, "error: x\n", "KILLED"),
        (OSError(errno.ENOSPC, "No space", "data/x"), 73, "error: no space left on the disk", "FAILED"),
        (KeyboardInterrupt(), 130, "error: stopped; `dvc repro` continues with this stage\n", "KILLED"),
        (typer.Exit(5), 5, "", "FAILED"),
        (ZeroDivisionError("a bug of ours is not hidden"), 1, "", "FAILED"),
    ],
)
def test_an_error_decides_the_exit_code_of_a_stage_and_the_status_of_its_run(
    here, error, exit_code, message, status
):
    result = run(Mock(side_effect=error), tracker="mlflow")
    assert result.exit_code == exit_code
    assert result.output.startswith(message)
    assert journal_lines(here)[-1]["status"] == status


def test_bad_params_are_refused_before_any_work(here):
    replace("params.yaml", "  n_head: 4", "  n_haed: 4")
    work = Mock()
    result = run(work)
    assert (result.exit_code, "did you mean n_head" in result.output) == (78, True)
    assert not work.called


def test_a_second_run_of_a_stage_names_the_process_of_the_first(here):
    with _runner._only_one("training"):
        result = run()
    assert result.exit_code == Busy.exit_code
    assert f"process {os.getpid()}" in result.output
    assert run().exit_code == 0


def test_under_dvc_a_stage_keeps_dvc_lock_as_it_found_it(here, monkeypatch):
    Path("dvc.lock").write_text("schema: '2.0'\n")
    assert run().exit_code == 0
    assert not Path(".dvc").exists()
    monkeypatch.setenv("DVC_STAGE", "training")
    Path("dvc.yaml").write_text("stages: {training: {cmd: x}}")
    assert run().exit_code == 0
    Path("dvc.lock").write_text("")
    assert CliRunner().invoke(commands, ["repair"]).output.startswith("dvc.lock was incomplete")
    assert Path("dvc.lock").read_text() == "schema: '2.0'\n"


def test_a_report_is_stable_json_and_the_journal_has_params_metrics_and_the_end(here):
    run(lambda stage: stage.report(Path("x.json"), {"b": 1, "best_val_loss": 2.0}), tracker="mlflow")
    assert (here / "x.json").read_text() == '{\n  "b": 1,\n  "best_val_loss": 2.0\n}\n'
    _, params, metrics, _, end = lines = journal_lines(here)
    assert [line["kind"] for line in lines] == ["start", "params", "metrics", "artifact", "end"]
    assert params["values"]["model.n_layer"] > 0
    assert metrics["values"] == {"val/best_loss": 2.0}
    assert end["status"] == "FINISHED"
    assert list(here.glob(".state/tracking/*/before/params.yaml"))


@pytest.mark.parametrize(("name", "splits"), [("training", 2), ("baseline@xz", 1), ("download", 0)])
def test_a_run_names_the_token_files_that_it_reads(here, name, splits):
    files = {f"{split}.tokens": {"sha256": "a" * 64, "bytes": 9} for split in ("train", "val")}
    write_json(here / "data/tokens/manifest.json", {"files": files})
    with _runner.open_stage(name, "mlflow"):
        pass
    inputs = [line for line in journal_lines(here) if line["kind"] == "inputs"]
    assert [len(line["datasets"]) for line in inputs] == [splits] * bool(splits)


CHAIN = """stages:
  download: {cmd: x, params: [download.corpus], deps: [corpus], outs: [data/documents]}
  training: {cmd: x, params: [training], deps: [corpus, src, data/documents, reports], outs: [model]}
  baseline:
    matrix: {name: "${baseline.names}"}
    cmd: x
    params: ["baseline.specs.${item.name}"]
    outs: ["out/${item.name}"]
"""
FILES = {"dvc.yaml": CHAIN, "corpus/a.txt": "a", "src/a.py": "a = 1", "reports/a.json": "{}",
         "data/documents/a": "a"}  # fmt: skip
LEFTOVERS = [".a.txt.swp", "a.txt~", "#a.txt#", "4913", ".DS_Store", "a.pyc", "__pycache__/a.pyc"]


@pytest.fixture
def chain(here, monkeypatch):
    """A project of several stages, while DVC runs its stage `training`."""
    monkeypatch.setenv("DVC_STAGE", "training")
    for name, content in FILES.items():
        write(name, content)
    return here


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: replace("params.yaml", "steps: 1400", "steps: 90"), "training.max_steps (1400 -> 90)"),
        (lambda: write("corpus/b.txt", "b"), "corpus/b.txt"),
        (lambda: write("src/a.py", "a = 2"), "src/a.py"),
        (lambda: write("data/documents/a", "b"), "data/documents/a"),
        (lambda: shutil.rmtree("data/documents"), "data/documents/a"),
    ],
)
def test_inputs_that_change_while_a_stage_runs_fail_it(chain, edit, message):
    result = run(lambda stage: edit(), tracker="mlflow")
    assert result.exit_code == CheckFailed.exit_code
    assert f"error: changed while training ran: {message}. DVC records no results" in result.output
    assert journal_lines(chain)[-1]["status"] == "FAILED"


@pytest.mark.parametrize(
    "edit",
    [
        lambda: replace("params.yaml", "  top_k: 40", "  top_k: 41"),  # a parameter of another stage
        lambda: write("src/a.py", FILES["src/a.py"]),  # as `git checkout` of the same version
        lambda: [write(f"{folder}/{name}", "x") for name in LEFTOVERS for folder in ("corpus", "src/b")],
        lambda: [Path("corpus", name).symlink_to(name) for name in (".#a.txt", "loop")],
        lambda: write("dvc.lock", "schema: '2.0'\nstag"),  # another `dvc` process writes it
        lambda: replace("dvc.yaml", "params: [training]", "params: [model]"),  # DVC has read it already
    ],
)
def test_what_is_no_change_of_the_inputs_fails_no_stage(chain, edit):
    result = run(lambda stage: edit())
    assert (result.exit_code, result.output.count("\n")) == (0, 1)


def test_dvc_ignores_the_same_files_inside_a_dependency(tmp_path):
    (tmp_path / ".dvcignore").write_text((ROOT / ".dvcignore").read_text())
    (tmp_path / ".dvc").mkdir()
    with open_repo(tmp_path) as repo:
        for name in LEFTOVERS:
            assert repo.dvcignore.is_ignored_file(str(tmp_path / "src" / name)), name
        assert not repo.dvcignore.is_ignored_file(str(tmp_path / "src/#1.txt"))
    assert not is_ignored("#1.txt")


@pytest.mark.parametrize(
    ("name", "item", "key"), [("training", "", "training"), ("baseline", "xz", "baseline.specs.xz")]
)
def test_a_report_has_the_hash_of_the_parameters_that_dvc_records_for_its_stage(chain, name, item, key):
    with _runner.open_stage(name, "none", item=item) as stage:
        stage.report(Path("x.json"), {"loss": 2.0})
    section = value_at(read_yaml(chain / "params.yaml"), key)
    assert read_json(Path("x.json")) == {"loss": 2.0, "params_sha256": params_sha256({key: section})}


def test_a_stage_prints_its_position_and_the_time_of_earlier_runs(chain, monkeypatch):
    names = read_yaml(chain / "params.yaml")["baseline"]["names"]
    position = f"stage 2 of {2 + len(names)}: training"
    assert run().output == f"{position}\n"
    clock = iter([1000.0, 1180.0])  # the first run takes 180 s
    with monkeypatch.context() as patch:
        patch.setattr(_runner, "time", Mock(time=lambda: next(clock)))
        run()
    times = {"download": 6000} | {f"baseline@{name}": 60 for name in names}  # download is an earlier stage
    for stage, seconds in times.items():
        write(f".state/seconds/{stage}", str(seconds))
    assert f"{position}; this and the later stages took {3 + len(names)} min last time" in run().output
