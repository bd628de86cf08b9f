"""A version runs again with DVC, and its hashes are compared; code of others needs consent."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import (
    BadConfig,
    BadData,
    CheckFailed,
    MissingInput,
    NotAllowed,
    OutsideFolder,
    UserError,
)
from compactgpt.common.storage import write_json, write_text
from compactgpt.tracking import reproduce as module
from compactgpt.tracking.dvc_files import md5_path
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.records import Version, find_version, version_here
from compactgpt.tracking.reproduce import DIFFERENT, IDENTICAL, ROUNDING, compare_hashes, find_missing
from compactgpt.tracking.store import open_store
from tests.support import tracking_store
from tests.support.dvc_projects import dvc, git, git_repository

CHAIN = """
stages:
  estimate:
    cmd: mkdir -p data && echo checked > data/inputs.json
    deps: [stages/download.py]
    outs: [data/inputs.json]
  download:
    cmd: python stages/download.py
    deps: [corpus, data/inputs.json, stages/download.py]
    outs: [data/documents]
  training:
    cmd: python stages/training.py
    deps: [data/documents, stages/training.py]
    params: [training.steps]
    outs: [models/compact, reports/training.json: {cache: false}]
"""
DOWNLOAD = """
import pathlib
folder = pathlib.Path("data/documents")
folder.mkdir(parents=True)
(folder / "a").write_text(pathlib.Path("corpus/text").read_text().upper())
"""
TRAINING = """
import json, pathlib
text = pathlib.Path("data/documents/a").read_text()
steps = int(pathlib.Path("params.yaml").read_text().split()[-1])
pathlib.Path("models/compact").mkdir(parents=True)
pathlib.Path("models/compact/weights").write_text(text * steps)
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path("reports/training.json").write_text(json.dumps({"val_loss": len(text) / steps}))
"""
FILES = {
    "dvc.yaml": CHAIN,
    "params.yaml": "training:\n  steps: 3\n",
    "stages/download.py": DOWNLOAD,
    "stages/training.py": TRAINING,
    "corpus/text": "some text",
    ".gitignore": "/data\n/models\n/.state\n/mlflow.db*\n/mlartifacts\n/corpus/text\n",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store):
    """A committed project whose pipeline ran with uncommitted changes, logged to MLflow."""
    root = git_repository(tmp_path_factory.mktemp("finished") / "a b", {})
    for path, content in FILES.items():
        write_text(root / path, content)
    (root / "mlflow.db").write_bytes(empty_store)
    git(root, "add", ".")
    git(root, "commit", "-qm", "x")
    (root / "params.yaml").write_text("training:\n  steps: 4\n")
    dvc(root, "repro", "-q")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.chdir(root)
        sync(root)
    return root


@pytest.fixture
def root(finished, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(finished)  # artifact paths are relative to the repository
    return finished


@pytest.fixture
def version(root, tmp_path):
    (run,) = tracking_store.runs(root)
    return find_version(root, run.info.run_id[:10], tmp_path)


@pytest.fixture
def reproduce(root, monkeypatch):
    """Reproduces a version, or the version with this name; the user confirms."""

    def run(version, log=lambda _: None):
        if isinstance(version, Version):
            monkeypatch.setattr(module, "find_version", lambda *_: version)
        return module.reproduce(str(version), root, log, lambda _: True)

    return run


@pytest.fixture
def commit_to_branch(root):
    """Commits files (a path: a symbolic link) to a new branch, and returns the name of the branch."""

    def commit(files):
        tree = Path(tempfile.mkdtemp(dir=root.parent))
        git(root, "worktree", "add", "-q", "-b", tree.name, str(tree), "HEAD")
        for path, content in {"dvc.lock": (root / "dvc.lock").read_text(), **files}.items():
            if isinstance(content, Path):
                (tree / path).parent.mkdir(exist_ok=True)
                (tree / path).symlink_to(content)
            else:
                write_text(tree / path, content)
            git(tree, "add", "-f", path)
        git(tree, "commit", "-qm", "\x1b[2Jof someone else")
        return tree.name

    return commit


def test_a_run_with_uncommitted_changes_is_identical_and_sees_no_settings_of_dvc(
    root, version, reproduce, capfd, monkeypatch
):
    settings = root / ".dvc/config.local"
    settings.write_text("['remote \"store\"']\nurl = s3://bucket\nsecret_access_key = KEY\n")
    seen, real = [], module._run_dvc

    def run_dvc(tree):
        seen.extend(path for path in tree.parent.rglob("*") if path.is_file())
        assert not [path for path in seen if b"secret_access_key" in path.read_bytes()]
        return real(tree)

    monkeypatch.setattr(module, "_run_dvc", run_dvc)
    killed = root / ".state/reproductions/.run.999999999.compactgpt-tmp"  # as a killed process leaves it
    killed.mkdir(parents=True)
    before, lines = git(root, "status", "--porcelain"), []
    corpus, content = root / "corpus/text", (root / "corpus/text").read_text()
    corpus.write_text("changed since")
    result = reproduce(version, log=lines.append)
    settings.unlink()
    corpus.write_text(content)
    assert seen
    assert (result.verdict, list(result.stages)) == (IDENTICAL, ["estimate", "download", "training"])
    assert lines[-1] == "the data was restored from DVC's cache or remote"
    assert "Stage 'download' didn't change, skipping" in capfd.readouterr().err
    assert git(root, "status", "--porcelain") == before
    assert list((root / ".state/reproductions").iterdir()) == []


def test_data_comes_from_the_projects_remote_and_a_changed_hash_is_different(
    root, version, reproduce, tmp_path, monkeypatch
):
    dvc(root, "remote", "add", "-q", "--local", "-d", "store", str(tmp_path / "remote"))
    dvc(root, "push", "-q")
    (root / ".dvc/cache").rename(tmp_path / "cache")
    lock = version.place.read("dvc.lock").replace(md5_path(root / "models/compact").encode(), b"f" * 32)
    (version.place.root / "dvc.lock").write_bytes(lock)
    changed, lines = replace(version), []  # the copy reads the changed dvc.lock
    try:
        result = reproduce(changed, log=lines.append)
        assert lines[-1] == "the data was restored from DVC's cache or remote"
        assert (result.verdict, result.first) == (DIFFERENT, "training")
        assert "models/compact" in result.why
        shutil.rmtree(tmp_path / "remote")
        monkeypatch.setattr(module, "_run_dvc", lambda _: 1)
        with pytest.raises(CheckFailed, match="a stage failed"):
            reproduce(version, log=lines.append)
        assert lines[-1] == "the download stage runs again"
    finally:
        (root / ".dvc/config.local").unlink()
        (tmp_path / "cache").rename(root / ".dvc/cache")


def test_what_is_missing_is_named_before_anything_runs(root, version, reproduce, monkeypatch):
    assert find_missing(version, root) == []
    assert "git lacks commit ffffff" in find_missing(replace(version, commit="f" * 40), root)[0]
    with pytest.raises(MissingInput, match="were not kept"):
        reproduce(replace(version, diff=None))
    monkeypatch.setattr("compactgpt.tracking.dvc_files.Cache.has", lambda *_: False)
    assert find_missing(version, root) == []
    text = root / "corpus/text"
    content = text.read_text()
    text.write_text("changed since")
    assert "corpus has changed since the data was made" in find_missing(version, root)[0]
    text.write_text(content)
    versions, machine = {**version.packages, "numpy": "0.1"}, {**version.machine, "cpu.vectors": "sve"}
    other = replace(version, packages=versions, machine=machine)
    monkeypatch.setattr(module, "find_version", lambda *_: other)
    missing, notes = module.list_missing("run", root)
    assert [note.partition(",")[0] for note in notes] == ["numpy was 0.1", "cpu.vectors was sve"]
    assert missing == []


@pytest.mark.parametrize(
    ("loss", "machine", "params", "verdict", "why"),
    [
        (4.864, {"cpu.vectors": "sse"}, {}, ROUNDING, "at most 0.14%; cpu.vectors was sse, on this"),
        (4.864, {}, {}, DIFFERENT, "val_loss differs by 0.14%"),
        (5.2, {"cpu.vectors": "sse"}, {}, DIFFERENT, "val_loss differs by 7.06%"),
        (4.864, {"cpu.vectors": "sse"}, {"steps": 5}, DIFFERENT, "training has other params"),
    ],
)
def test_another_processor_explains_a_small_difference_of_a_loss(
    tmp_path, loss, machine, params, verdict, why
):
    for name, value, changed in (("old", 4.857, {}), ("new", loss, params)):
        write_json(tmp_path / name / "reports/training.json", {"val_loss": value})
        write_text(tmp_path / name / "dvc.yaml", "stages: {training: {cmd: x}}")
        tracking_store.save_lock(tmp_path / name, {"training": ["reports/training.json"]}, **changed)
    first, second = (version_here(name, tmp_path / name) for name in ("old", "new"))
    result = compare_hashes(replace(first, machine=first.machine | machine), second)
    assert result.verdict == verdict
    assert why in result.why
    assert result.lines()[-1].startswith(f"old: {verdict}, first in training: ")


def test_an_unknown_name_a_run_without_a_lock_and_the_work_tree_are_refused(root, reproduce):
    with pytest.raises(BadConfig, match="not a run of MLflow"):
        reproduce("nothing")
    store = open_store(root)
    bare = store.client.create_run(store.experiment, run_name="by hand").info.run_id
    with pytest.raises(MissingInput, match=r"has no dvc\.lock"):
        reproduce(bare)
    store.client.delete_run(bare)
    with pytest.raises(BadConfig, match="is not a run"):
        reproduce("workspace")


# The code of a version can be from someone else.


@pytest.fixture
def victim(tmp_path):
    """A folder outside of the project, with a file that must not change."""
    folder = tmp_path / "victim"
    write_text(folder / "documents/a", "mine")
    yield folder
    assert (folder / "documents/a").read_text() == "mine"


@pytest.mark.parametrize(
    "body",
    ["outs: [../../../../victim]", "outs: ['${{training.steps}}']", "deps: [{victim}/documents/a]",
     "wdir: {victim}, outs: [documents]", "outs: ['s3://bucket/file']"],
)  # fmt: skip
def test_a_stage_with_a_path_out_of_the_checkout_never_runs(
    commit_to_branch, reproduce, victim, tmp_path, body
):
    files = {
        "dvc.yaml": f"stages: {{evil: {{cmd: touch {tmp_path}/ran, {body.format(victim=victim)}}}}}",
        "params.yaml": f"training: {{steps: {victim}}}\n",
    }
    with pytest.raises(BadData, match=r"is outside of|s3"):
        reproduce(commit_to_branch(files))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["models/compact", ".dvc/tmp", ".state"])
def test_a_link_out_of_the_checkout_is_refused(commit_to_branch, reproduce, victim, path):
    with pytest.raises(OutsideFolder, match="is a symbolic link out of"):
        reproduce(commit_to_branch({path: victim}))


@pytest.mark.parametrize(
    "diff",
    [
        "--- /dev/null\n+++ b/../../../escaped\n@@ -0,0 +1 @@\n+x\n",
        "diff --git a/data b/data\nnew file mode 120000\n--- /dev/null\n+++ b/data\n@@ -0,0 +1 @@\n"
        "+{tmp}\n\\ No newline at end of file\n",
    ],
)
def test_uncommitted_changes_of_a_run_stay_inside(root, version, reproduce, tmp_path, diff):
    with pytest.raises(UserError, match=r"git apply failed|symbolic link out of"):
        reproduce(replace(version, diff=diff.format(tmp=tmp_path).encode()))
    assert not list(root.rglob("escaped")) + list(tmp_path.rglob("escaped"))


def test_a_commit_that_is_an_option_of_git_is_not_a_commit(root, tmp_path):
    """`git diff --stat --output=FILE` would write the file."""
    store = open_store(root)
    (run,) = tracking_store.runs(root)
    tags = {"stage": "pipeline", "git.commit": f"--output={tmp_path}/written"}
    forged = store.client.create_run(store.experiment, tags=tags).info.run_id
    (tmp_path / "logged").mkdir()
    store.client.download_artifacts(run.info.run_id, "", str(tmp_path / "logged"))
    store.client.log_artifacts(forged, str(tmp_path / "logged"))
    try:
        done = CliRunner().invoke(app, ["diff", forged, "workspace"])
        assert done.exit_code == 0, done.output
        assert not (tmp_path / "written").exists()
        done = CliRunner().invoke(app, ["reproduce", "--check", forged])
        assert (done.exit_code, "names no commit" in done.output) == (66, True)
    finally:
        store.client.delete_run(forged)


def test_the_command_shows_code_of_others_and_runs_it_only_with_trust(root, commit_to_branch, tmp_path):
    (run,) = tracking_store.runs(root)
    done = CliRunner().invoke(app, ["reproduce", run.info.run_id])  # no terminal
    assert done.exit_code == NotAllowed.exit_code, done.output
    for text in ("by a@example.com <", "changes  params.yaml", "download  python stages/download.py"):
        assert text in done.output
    command = f"touch {tmp_path}/ran"
    name = commit_to_branch({"dvc.yaml": f"stages: {{evil: {{cmd: '{command}'}}}}"})
    done = CliRunner().invoke(app, ["reproduce", name])
    assert done.exit_code == NotAllowed.exit_code, done.output
    for text in (f"evil  {command}", "without a terminal run `compactgpt reproduce", "--trust"):
        assert text in done.output
    assert "\x1b" not in done.output
    assert not (tmp_path / "ran").exists()
    done = CliRunner().invoke(app, ["reproduce", "--trust", name])
    assert (tmp_path / "ran").exists(), done.output


def test_on_a_terminal_the_user_is_asked(root, commit_to_branch, tmp_path):
    name = commit_to_branch({"dvc.yaml": f"stages: {{evil: {{cmd: touch {tmp_path}/ran}}}}"})
    ours, terminal = os.openpty()
    os.write(ours, b"n\n")
    command = [sys.executable, "-c", "from compactgpt.cli import app; app()", "reproduce", name]
    done = subprocess.run(command, cwd=root, stdin=terminal, capture_output=True, text=True, check=False)
    assert "Run this code? [y/N]" in done.stderr
    assert done.returncode == NotAllowed.exit_code
    assert not (tmp_path / "ran").exists()


def test_a_commit_of_the_present_history_needs_no_consent(root, version, commit_to_branch):
    ours, theirs = (find_version(root, name, root) for name in ("HEAD", commit_to_branch({})))
    assert [module.is_in_history(one, root) for one in (ours, theirs, version)] == [True, False, False]
