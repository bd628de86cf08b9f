"""Which uncommitted changes are logged: code and settings, 1 MB at most, once a pipeline, private."""

import re
import stat
from pathlib import Path

import pytest

from compactgpt.common.errors import UserError
from compactgpt.common.git import DIFF, git_facts, git_text, uncommitted_changes
from stages import _runner
from tests.support.dvc_projects import ROOT, git
from tests.support.tracking_store import copy, runs


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with one commit."""
    (tmp_path / "src").mkdir()
    for path in ("params.yaml", "src/code.py"):
        (tmp_path / path).write_bytes((ROOT / "params.yaml").read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_new_files_are_logged_only_if_they_are_small_code_or_settings(project):
    left_out = ["src/compactgpt/.env", "src/.hidden/a.py", "src/id_rsa", "src/a.sqlite", "src/big.txt"]
    for name in ["src/new.py", "conf/new.yaml", *left_out]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x" * (2_000_000 if name == "src/big.txt" else 1))
    (project / "src/link.py").symlink_to("/etc/passwd")
    diff, reasons = uncommitted_changes(project)
    assert re.findall(rb"\+\+\+ b/(.*)", diff) == [b"conf/new.yaml", b"src/new.py"]
    assert {line.partition(" ")[0] for line in reasons} == {*left_out, "src/link.py"}
    (project / "src/code.py").write_bytes(b"y\n" * 1_000_000)
    (diff, reasons), facts = uncommitted_changes(project), git_facts(project)
    assert len(diff) < 1000
    assert reasons[0].startswith("changes to tracked files (")
    assert facts["git.dirty"] == "true"
    assert "src/big.txt (2,000,000 bytes)" in facts["git.left_out"]


def test_a_failure_of_git_has_gits_own_words_and_keys_are_ignored(tmp_path):
    with pytest.raises(UserError, match=r"git rev-parse failed: .*not a git repository"):
        git_text(tmp_path, "rev-parse", "HEAD")
    assert git(ROOT, "check-ignore", ".env", "src/compactgpt/.env", ".env.local").count("\n") == 3


def test_the_first_stage_of_a_pipeline_logs_the_changes_for_this_user_only(project, empty_store, monkeypatch):
    from compactgpt.tracking import journal, mlflow_logger

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow_logger, "start_logger", lambda folder: None)
    pipeline = {"pid": 1, "created": 1.0, "command": "dvc repro"}
    facts = journal.process_facts() | {"pipeline": pipeline}
    monkeypatch.setattr(_runner, "process_facts", lambda: facts)
    (project / "mlflow.db").write_bytes(empty_store)
    (project / "src/code.py").write_text("changed\n")
    for name in ("estimate", "validation"):
        with _runner.open_stage(name, "mlflow"):
            pass
    assert [path.parent.name for path in (project / ".state").rglob(DIFF)] == ["before"]
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    assert copy(project)
    (parent,) = [run for run in runs(project) if run.data.tags["stage"] == "pipeline"]
    artifact = Path(parent.info.artifact_uri.removeprefix("file://")) / DIFF
    assert b"+changed" in artifact.read_bytes()
    for path in (artifact, *(project / ".state").rglob(DIFF)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
