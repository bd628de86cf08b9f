"""A run is run again from its record alone, by DVC itself; what is not the same is named."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotAllowed, OutsideFolder, UserError
from compactgpt.common.worktree import scratch_worktree
from compactgpt.tracking.dvc_files import Cache, Chain, Commit, Folder, checkout, md5_path, read_chain
from compactgpt.tracking.journal import machine_facts, packages
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.records import Version, find_version, parse_versions
from compactgpt.tracking.reproduce import (
    DIFFERENT,
    DVC_SETTINGS,
    IDENTICAL,
    ROUNDING,
    _is_in_history,
    changed_environment,
    compare_hashes,
    find_missing,
    reproduce,
    run_again,
)
from compactgpt.tracking.store import open_store
from tests.support import tracking_store

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
    "corpus/README.md": "the user's own",
    ".gitignore": "/data\n/models\n/.state\n/mlflow.db*\n/mlartifacts\n/corpus/text\n",
}


def dvc(root: Path, *words: str) -> None:
    env = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run([sys.executable, "-m", "dvc", *words, "-q"], cwd=root, env=env, check=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, empty_store):
    """A committed project whose pipeline ran with uncommitted changes, known to MLflow."""
    root = tmp_path_factory.mktemp("ran") / "a b"
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    (root / "corpus/text").write_text("some text")
    (root / "mlflow.db").write_bytes(empty_store)
    tracking_store.git(root, "init", "-q")
    dvc(root, "init")
    tracking_store.git(root, "add", ".")
    tracking_store.git(root, "commit", "-qm", "x")
    (root / "params.yaml").write_text("training:\n  steps: 4\n")
    dvc(root, "repro")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.chdir(root)
        sync(root, record_unrun=True)
    return root


@pytest.fixture
def root(ran, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(ran)  # artifact paths are relative to the repository
    return ran


@pytest.fixture
def record(root, tmp_path):
    (run,) = tracking_store.runs(root)
    return find_version(root, run.info.run_id[:10], tmp_path)


def again(record, root, *, agree=lambda _: True, keep=False, **options):
    with scratch_worktree(root / ".state/reproductions", keep=keep) as scratch:
        return run_again(record, root, scratch, confirm=agree, **options)


def test_a_dirty_run_is_run_again_from_its_record_and_a_tampered_one_is_different(root, record):
    before = tracking_store.git(root, "status", "--porcelain")
    assert find_missing(record, root) == []
    told = []
    result = again(record, root, log=told.append)
    assert result.verdict == IDENTICAL
    assert told[-1] == "the data comes from DVC's cache, by its hash"
    assert [one.stage for one in result.stages] == ["estimate", "download", "training"]
    assert tracking_store.git(root, "status", "--porcelain") == before
    assert list((root / ".state/reproductions").iterdir()) == []
    tampered = record.diff.replace(b"+  steps: 4", b"+  steps: 5")
    lock = record.place.read("dvc.lock").replace(md5_path(root / "models/compact").encode(), b"f" * 32)
    (record.place.root / "dvc.lock").write_bytes(lock)
    assert tampered != record.diff
    changed = replace(record, chain=read_chain(record.place))
    result = again(changed, root, rebuild=True)
    assert (result.verdict, result.first) == (DIFFERENT, "training")
    assert result.exit_code == 3
    assert "models/compact" in result.why


def test_missing_things_are_named_before_anything_runs(root, record):
    assert "git lacks commit ffffff" in find_missing(replace(record, commit="f" * 40), root)[0]
    with pytest.raises(MissingInput, match="were not kept"):
        again(replace(record, diff=None), root)
    other = replace(record, packages={**record.packages, "numpy": "0.1"})
    other = replace(other, machine={**record.machine, "cpu.vectors": "sve"})
    changed = changed_environment(other, root)
    assert {name: pair[0] for name, pair in changed.items()} == {"numpy": "0.1", "cpu.vectors": "sve"}


def test_data_that_is_neither_cached_nor_can_be_made_is_missing(root, record, monkeypatch):
    monkeypatch.setattr("compactgpt.tracking.dvc_files.Cache.has", lambda *_: False)
    assert find_missing(record, root) == []
    text = root / "corpus/text"
    content = text.read_text()
    text.write_text("changed since")
    assert "corpus is not what it was made from" in find_missing(record, root)[0]
    text.write_text(content)


def recorded(tmp_path, loss: float, **changes) -> Version:
    """A record of one stage with a report."""
    (tmp_path / "reports").mkdir(exist_ok=True)
    (tmp_path / "reports/training.json").write_text(json.dumps({"val_loss": loss}))
    (tmp_path / "dvc.yaml").write_text("stages: {training: {cmd: x}}")
    tracking_store.save_lock(tmp_path, {"training": ["reports/training.json"]}, **changes)
    place, known = Folder(tmp_path), parse_versions(packages())
    return Version("run", place, read_chain(place), machine=machine_facts(), packages=known)


def two(tmp_path, then: float, now: float, machine=None, **changes) -> tuple[Version, Chain, Folder]:
    folders = [tmp_path / name for name in ("then", "now")]
    for folder in folders:
        folder.mkdir()
    old, new = recorded(folders[0], then), recorded(folders[1], now, **changes)
    return replace(old, machine={**old.machine, **(machine or {})}), new.chain, new.place


def judge(version, rebuilt, place):
    return compare_hashes(version, rebuilt, place, changed_environment(version, place.root))


def test_another_processor_explains_a_difference_within_rounding_only(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864, {"cpu.vectors": "sse"}))
    assert result.verdict == ROUNDING
    assert result.exit_code == 0
    assert "cpu.vectors was sse, here it is" in result.why
    assert "0.14%" in result.why


def test_the_same_difference_on_the_same_machine_is_no_rounding(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864))
    assert (result.verdict, result.first) == (DIFFERENT, "training")
    assert "val_loss differs by 0.14%" in result.why


def test_a_large_difference_is_no_rounding_on_any_machine(tmp_path):
    result = judge(*two(tmp_path, 4.857, 5.2, {"cpu.vectors": "sse"}))
    assert result.verdict == DIFFERENT
    assert "more than rounding" in result.why


def test_other_parameters_are_named(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864, {"cpu.vectors": "sse"}, steps=5))
    assert (result.verdict, result.why) == (DIFFERENT, "training has other params")


def test_a_name_that_means_nothing_or_too_much_is_refused(root, tmp_path):
    with pytest.raises(BadConfig, match="not a run of MLflow"):
        find_version(root, "nothing", tmp_path)
    store_of_root = open_store(root)
    client, experiment = store_of_root.client, store_of_root.experiment
    bare = client.create_run(experiment, run_name="by hand").info.run_id
    with pytest.raises(MissingInput, match=r"has no dvc\.lock"):
        find_version(root, bare, tmp_path / "none")
    client.delete_run(bare)
    with pytest.raises(BadConfig, match="is not a run"):
        reproduce("workspace", root)


# --- a version is code of someone else


@pytest.fixture
def victim(tmp_path):
    """A file of the user's outside of the project."""
    path = tmp_path / "victim/documents/a"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.fixture
def forged(root):
    """Makes a branch with a dvc.lock and changed files (a path: a symbolic link); it ends with the test."""
    names = []

    def make(files):
        names.append(f"forged-{len(names)}-{os.getpid()}")
        tree = root.parent / names[-1]
        tracking_store.git(root, "worktree", "add", "-q", "-b", names[-1], str(tree), "HEAD")
        for path, content in {"dvc.lock": (root / "dvc.lock").read_text(), **files}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).unlink(missing_ok=True)
            if isinstance(content, Path):
                (tree / path).symlink_to(content)
            else:
                (tree / path).write_text(content)
            tracking_store.git(tree, "add", "-f", path)
        tracking_store.git(tree, "commit", "-qm", "\x1b[2Jof someone else")
        tracking_store.git(root, "worktree", "remove", "--force", str(tree))
        return names[-1]

    yield make
    for name in names:
        tracking_store.git(root, "branch", "-D", "-q", name)


def run_version(root, name, *, agree=lambda _: True, **options):
    return reproduce(name, root, confirm=agree, **options)


@pytest.mark.parametrize("kind", ["deps", "outs"])
@pytest.mark.parametrize("path", ["../../victim/documents", "/{victim}", "data/../../x", ""])
def test_a_lock_with_a_path_out_of_the_project_is_refused(record, victim, kind, path):
    path = path.replace("/{victim}", str(victim.parent))
    lock = {"schema": "2.0", "stages": {"download": {"cmd": "x", kind: [{"path": path, "md5": "0" * 32}]}}}
    (record.place.root / "dvc.lock").write_text(json.dumps(lock))
    with pytest.raises(OutsideFolder, match=r"^dvc\.lock: the path .* is outside of the project"):
        read_chain(record.place)


def test_a_run_whose_lock_leads_out_is_not_reproduced(root, record, victim):
    """As it was found: the lock of an MLflow run names a folder elsewhere, which was replaced."""
    evil = os.path.relpath(victim.parent, root / ".state/reproductions/x")
    lock = record.place.read("dvc.lock").replace(b"data/documents", evil.encode())
    (record.place.root / "dvc.lock").write_bytes(lock)
    with pytest.raises(OutsideFolder):
        again(replace(record, chain=read_chain(record.place)), root)


@pytest.mark.parametrize(
    "md5", ["../../../../etc/passwd", "..", "ab", "ab/../../" + "0" * 23, "0" * 31 + "/"]
)
def test_a_hash_that_is_a_path_is_refused(root, md5):
    with pytest.raises(OutsideFolder, match="not a hash of DVC's cache"):
        Cache(root).has(md5)


def test_a_listing_of_the_cache_writes_nothing_outside_of_its_folder(tmp_path, victim):
    content = tracking_store.cache_out(tmp_path, "victim/documents/a")
    for name in ("../victim/documents/a", str(victim)):
        listing = json.dumps([{"md5": content, "relpath": name}])
        (cached := tmp_path / ".dvc/cache/files/md5/00" / f"{'0' * 30}.dir").parent.mkdir(exist_ok=True)
        cached.write_text(listing)
        with pytest.raises(OutsideFolder):
            checkout(Cache(tmp_path), Folder(tmp_path), "out", "0" * 32 + ".dir", tmp_path / "out")


def test_a_copy_through_a_link_in_the_target_is_refused(tmp_path, victim):
    (tmp_path / "new").write_text("theirs")
    md5 = tracking_store.cache_out(tmp_path, "new")
    listing = json.dumps([{"md5": md5, "relpath": "link/a"}])
    cached = tmp_path / ".dvc/cache/files/md5/00" / f"{'0' * 30}.dir"
    cached.parent.mkdir()
    cached.write_text(listing)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(victim.parent)
    with pytest.raises(OutsideFolder, match="symbolic link"):
        checkout(Cache(tmp_path), Folder(tmp_path), "out", "0" * 32 + ".dir", tmp_path / "out")


@pytest.mark.parametrize(
    "body",
    [
        "outs: [{victim}]",
        "outs: [../../../../victim]",
        "outs: ['${{training.steps}}']",
        "deps: [{victim}/documents/a]",
        "wdir: {victim}, outs: [documents]",
        "metrics: [{victim}/documents/a]",
        "plots: [{victim}/documents/a]",
        "outs: ['s3://bucket/file']",
    ],
)
def test_a_stage_with_a_path_out_of_the_work_tree_never_runs(root, forged, victim, tmp_path, body):
    body = body.format(victim=victim.parents[1])
    files = {
        "dvc.yaml": f"stages: {{evil: {{cmd: touch {tmp_path}/ran, {body}}}}}",
        "params.yaml": f"training: {{steps: {victim.parents[1]}}}\n",
    }
    with pytest.raises(BadData, match=r"is outside of|s3"):
        run_version(root, forged(files))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["data", "models/compact", ".dvc/tmp", ".state", "reports"])
def test_a_link_out_of_the_work_tree_in_a_commit_is_refused(root, forged, victim, path):
    name = forged({path: victim.parents[1]})
    with pytest.raises(OutsideFolder, match="is a symbolic link out of"):
        run_version(root, name)


@pytest.mark.parametrize(
    "diff",
    [
        "--- /dev/null\n+++ b/../../../escaped\n@@ -0,0 +1 @@\n+x\n",
        "--- /dev/null\n+++ b/.git/hooks/escaped\n@@ -0,0 +1 @@\n+x\n",
        "diff --git a/data b/data\nnew file mode 120000\n--- /dev/null\n+++ b/data\n@@ -0,0 +1 @@\n"
        "+{tmp}\n\\ No newline at end of file\n",
    ],
)
def test_uncommitted_changes_of_a_run_stay_inside(root, record, tmp_path, diff):
    with pytest.raises(UserError, match=r"git apply failed|symbolic link out of"):
        again(replace(record, diff=diff.format(tmp=tmp_path).encode()), root)
    assert not list(root.rglob("escaped")) + list(tmp_path.rglob("escaped"))


def test_a_commit_that_is_an_option_of_git_is_none(root, tmp_path, monkeypatch):
    """`git diff --stat --output=FILE` would write the file."""
    opened = open_store(root)
    client, experiment = opened.client, opened.experiment
    (run,) = tracking_store.runs(root)
    tags = {**run.data.tags, "git.commit": f"--output={tmp_path}/written"}
    forged = client.create_run(experiment, tags={key: str(tags[key]) for key in ("stage", "git.commit")})
    (tmp_path / "logged").mkdir()
    client.download_artifacts(run.info.run_id, "", str(tmp_path / "logged"))
    client.log_artifacts(forged.info.run_id, str(tmp_path / "logged"))
    try:
        (tmp_path / "a").mkdir()
        found = find_version(root, forged.info.run_id, tmp_path / "a")
        assert found.commit == ""
        monkeypatch.chdir(root)
        done = CliRunner().invoke(app, ["diff", forged.info.run_id, "workspace"])
        assert done.exit_code == 0, done.output
        assert not (tmp_path / "written").exists()
        assert "names no commit" in find_missing(found, root)[0]
    finally:
        client.delete_run(forged.info.run_id)


# --- nothing runs that the user has not agreed to


def test_a_run_from_a_store_is_shown_and_runs_only_when_the_user_agrees(root, record):
    plans = []
    with pytest.raises(NotAllowed, match="--trust"):
        again(record, root, agree=lambda plan: bool(plans.append(plan)))
    text = plans[0]
    assert record.commit[:7] in text
    assert "a@b" in text  # the author
    assert "changes  params.yaml" in text
    assert "download  python stages/download.py" in text
    assert "training  python stages/training.py" in text
    assert not list((root / ".state/reproductions").iterdir())


def test_the_command_asks_only_for_what_is_not_in_the_history(root, forged, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    (run,) = tracking_store.runs(root)
    cmd = f"touch {tmp_path}/ran"
    name = forged({"dvc.yaml": f"stages: {{evil: {{cmd: '{cmd}'}}}}"})
    for version in (run.info.run_id, name):
        done = CliRunner().invoke(app, ["reproduce", version])  # no terminal
        assert done.exit_code == NotAllowed.exit_code, done.output
        assert "commit " in done.output
    assert f"evil  {cmd}" in done.output
    assert "\x1b" not in done.output
    assert "of someone else" in done.output
    assert not (tmp_path / "ran").exists()
    done = CliRunner().invoke(app, ["reproduce", "--trust", name])
    assert (tmp_path / "ran").exists(), done.output
    assert "commit " in done.output  # it is shown then, too


@pytest.mark.parametrize(("answer", "agreed"), [(b"n\n", False), (b"y\n", True)])
def test_on_a_terminal_the_user_is_asked(root, forged, tmp_path, answer, agreed):
    name = forged({"dvc.yaml": f"stages: {{evil: {{cmd: touch {tmp_path}/ran}}}}"})
    ours, terminal = os.openpty()
    words = [sys.executable, "-c", "from compactgpt.cli import app; app()", "reproduce", name]
    os.write(ours, answer)
    done = subprocess.run(words, cwd=root, stdin=terminal, capture_output=True, text=True, check=False)
    assert "Run it? [y/N]" in done.stderr
    assert (tmp_path / "ran").exists() == agreed
    assert (done.returncode == NotAllowed.exit_code) == (not agreed)


def test_a_commit_of_the_present_history_runs_without_a_question(root, tmp_path):
    head = tracking_store.git(root, "rev-parse", "HEAD")
    known = Version("HEAD", Commit(root, head), Chain([], {}), head)
    assert _is_in_history(known, root)
    assert not _is_in_history(replace(known, place=Folder(tmp_path)), root)


def test_settings_and_keys_of_dvc_are_not_in_the_work_tree(root, record):
    settings = root / ".dvc/config.local"
    settings.write_text(
        "[cache]\ndir = cache\n['remote \"store\"']\nurl = s3://bucket\nsecret_access_key = KEY\n"
    )
    try:
        with scratch_worktree(root / ".state/reproductions") as scratch:
            assert run_again(record, root, scratch, confirm=lambda _: True).verdict == IDENTICAL
            found = {path for path in scratch.tree.rglob("*") if path.is_file()}
            assert not [path for path in found if b"secret_access_key" in path.read_bytes()]
            assert (scratch.tree / ".dvc/config").read_text() == DVC_SETTINGS
    finally:
        settings.unlink()


def test_data_comes_from_the_projects_own_remote(root, record, tmp_path):
    settings = root / ".dvc/config.local"
    dvc(root, "remote", "add", "--local", "-d", "store", str(tmp_path / "remote"))
    try:
        dvc(root, "push")
        (root / ".dvc/cache").rename(tmp_path / "cache")
        said = []
        assert again(record, root, log=said.append).verdict == IDENTICAL
        assert said[-1] == "the data comes from DVC's cache, by its hash"
    finally:
        settings.unlink()


# --- a kill leaves nothing

SLOW = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
name = "child" if len(sys.argv) > 1 else "parent"
pathlib.Path("{folder}", name).write_text(str(os.getpid()))
time.sleep(600)
"""


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_reproduction_leaves_neither_processes_nor_a_work_tree(root, forged, tmp_path, number):
    files = {
        "slow.py": SLOW.format(folder=tmp_path),
        "dvc.yaml": "stages: {slow: {cmd: python slow.py, deps: [slow.py], outs: [out]}}",
    }
    words = [
        sys.executable,
        "-c",
        "from compactgpt.cli import app; app()",
        "reproduce",
        "--trust",
        forged(files),
    ]
    pids = [tmp_path / "parent", tmp_path / "child"]
    with subprocess.Popen(words, cwd=root, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(lambda: all(path.exists() and path.read_text() for path in pids) or process.poll())
        assert len(list((root / ".state/reproductions").iterdir())) == 1
        os.kill(process.pid, number)
        process.wait()
    wait_for(lambda: not any(is_running(int(path.read_text())) for path in pids))
    wait_for(lambda: not list((root / ".state/reproductions").iterdir()))
    wait_for(lambda: len(tracking_store.git(root, "worktree", "list").splitlines()) == 1)


def test_what_a_command_left_running_ends_with_it(root, tmp_path):
    with scratch_worktree(root / ".state/reproductions") as scratch:
        scratch.tree.mkdir()
        words = ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid"]
        assert scratch.run(words, dict(os.environ)) == 0
        wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_a_killed_watchdog_does_not_keep_the_folder(root, tmp_path):
    with scratch_worktree(tmp_path / "folders") as scratch:
        scratch.tree.mkdir()
        scratch.watchdog.kill()
        assert scratch.run(["true"], dict(os.environ)) != 0
    assert list((tmp_path / "folders").iterdir()) == []
