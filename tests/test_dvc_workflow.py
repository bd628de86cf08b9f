"""What a DVC user does by hand, on small projects with the real git and DVC."""

import hashlib
import json
import re
import shutil

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.sections import read_yaml
from tests.support.dvc_projects import ROOT, dvc, git, git_repository, run
from tests.support.tiny_pipeline import make_place, params_tree

STAGE = {
    "cmd": "echo ran >> ran; cp params.yaml data/out; cp data/out reports/n.yaml",
    "params": ["n"],
    "deps": ["input"],
    "outs": ["data/out"],
    "metrics": [{"reports/n.yaml": {"cache": False}}],
}
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed project of one stage that copies params.yaml, run once."""
    place = git_repository(tmp_path / "project", {"copy": STAGE})
    (place / "input").write_text("1")
    for name in ("data", "reports"):
        (place / name).mkdir()
    (place / ".dvc/config").write_bytes((ROOT / ".dvc/config").read_bytes())
    (place / "params.yaml").write_text("n: 1\n")
    (place / ".gitignore").write_text("/data/\n/ran\n")
    dvc(place, "repro", "-q")
    git(place, "add", ".")
    git(place, "commit", "-q", "-m", "first")
    monkeypatch.chdir(place)
    return place


def test_a_lock_with_conflict_markers_is_left_to_the_user_with_advice_that_works(project):
    for branch, number in (("theirs", 22), ("main", 333)):  # of other sizes, for git
        git(project, "checkout", "-q", *(["-b"] if branch == "theirs" else []), branch)
        (project / "params.yaml").write_text(f"n: {number}\n")
        dvc(project, "repro", "-q")
        git(project, "commit", "-q", "-a", "-m", branch)
    assert run(project, "git", "merge", "theirs", check=False).returncode == 1
    lock = project / "dvc.lock"
    copy = project / ".dvc/tmp/compactgpt/dvc.lock"  # `repair` restores this copy
    copy.parent.mkdir()
    copy.write_text("schema: '2.0'\nstages: {}\n")
    before = lock.read_bytes()
    for command, error, message in (
        ("repair", BadData, "dvc.lock has conflict markers of an unresolved merge: keep one side"),
        ("estimate", BadConfig, "params.yaml has conflict markers of an unresolved merge: delete"),
    ):
        done = CliRunner().invoke(app, [command])
        assert (done.exit_code, message in done.output) == (error.exit_code, True)
    assert lock.read_bytes() == before
    # The advice, as it is written.
    (project / "params.yaml").write_text("n: 333\n")
    git(project, "add", "params.yaml", "reports")
    git(project, "checkout", "--ours", "dvc.lock")
    dvc(project, "repro", "-q")
    git(project, "add", "dvc.lock", "params.yaml", "reports")
    git(project, "commit", "-q", "-m", "merged")
    assert "up to date" in dvc(project, "status")


EDITED = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from stages._runner import open_stage
with open_stage("training", "none") as stage:
    Path("data/out").write_text(str(stage.params.training.max_steps))
    if not Path("edited").exists():
        Path("params.yaml").write_text(Path("params.yaml").read_text().replace("steps: 1400", "steps: 90"))
        Path("edited").touch()
"""


def test_dvc_records_no_parameter_that_changed_while_the_stage_ran(project):
    """The user prepares the next run while training runs: treeverse/dvc#11058."""
    stage = {"cmd": "python edited.py", "params": ["training"], "outs": ["data/out"]}
    YAML().dump({"stages": {"training": stage}}, project / "dvc.yaml")
    shutil.copy(ROOT / "params.yaml", project)
    (project / "edited.py").write_text(EDITED.format(root=str(ROOT)))
    done = run(project, "dvc", "repro", check=False)
    assert "error: changed while training ran: training.max_steps (1400 -> 90)" in done.stderr
    assert "training:" not in (project / "dvc.lock").read_text()
    shutil.copy(ROOT / "params.yaml", project)  # the message's advice: restore the earlier version
    dvc(project, "repro")
    assert "up to date" in dvc(project, "status")
    assert "max_steps: 1400" in (project / "dvc.lock").read_text()


def repro_as_make_does(project):
    """Run what `make repro` runs of DVC; `compactgpt check` wants the whole project."""
    lines = [line for line in run(ROOT, "make", "-n", "repro").stdout.splitlines() if line.startswith("dvc ")]
    assert [line.split()[1] for line in lines] == ["checkout", "repro"]
    return run(project, "bash", "-eu", "-c", "\n".join(lines))


def test_make_repro_runs_only_what_the_cache_lacks(project):
    clean = r"^clean:.*\n\t@rm -rf data models .state$"
    assert re.search(clean, (ROOT / "Makefile").read_text(), re.MULTILINE)
    shutil.rmtree(project / "data")
    repro_as_make_does(project)
    assert (project / "ran").read_text() == "ran\n"
    assert (project / "data/out").read_text() == "n: 1\n"
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc/cache")
    (project / "params.yaml").write_text("n: 4\n")
    assert repro_as_make_does(project).stderr == ""
    assert (project / "data/out").read_text() == "n: 4\n"


def test_make_repro_prints_the_table_before_it_copies_runs_to_mlflow():
    wanted = ["dvc repro", "python -m stages.comparison --show", "compactgpt sync --warn"]
    lines = run(ROOT, "make", "-n", "repro").stdout.splitlines()
    assert [line for line in lines if line in wanted] == wanted


@pytest.fixture
def own_text(project):
    """The project with the real stage `download`; its text, corpus/a.txt, is not tracked."""
    make_place(project)
    stage = read_yaml(ROOT / "dvc.yaml")["stages"]["download"] | {"deps": ["corpus"]}
    YAML().dump({"stages": {"download": stage}}, project / "dvc.yaml")
    text = "One:\nhello well\n\nTwo:\nlow"
    (project / "corpus/a.txt").write_text(text)
    tree = params_tree(0)
    tree["download"]["files"]["patterns"] = ["corpus/**"]
    hub = tree["download"]["hub"]
    hub["name"] = "tiny-shakespeare"
    copy = {"file": "corpus/a.txt", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    hub["sets"]["tiny-shakespeare"] |= {**copy, "join_characters": None}
    (project / "params.yaml").write_text(json.dumps(tree))  # JSON is YAML
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    git(project, "rm", "-q", "--cached", "dvc.lock")
    (project / "dvc.lock").unlink()
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "own text")
    return project


def documents_of(project, experiment):
    """The number of documents that an experiment's stage `download` wrote."""
    ref = git(project, "for-each-ref", "--format=%(refname)", f"**/{experiment}").strip()
    return json.loads(git(project, "show", f"{ref}:reports/download.json"))["documents"]


def test_text_that_dvc_tracks_is_in_every_copy_and_other_text_is_missed(own_text, tmp_path):
    """The corpus is a dep of `download` and not in git; only the .dvc files in it are."""
    path = tmp_path / "far texts/b.txt"
    path.parent.mkdir()
    path.write_text("b")
    dvc(own_text, "add", str(path.parent), "-o", "corpus/far")  # DVC stages `corpus/far.dvc` in git
    assert git(own_text, "ls-files", "corpus").split() == ["corpus/far.dvc"]
    done = run(own_text, "dvc", "exp", "run", "--temp", check=False)
    assert "lacks corpus/a.txt, which DVC does not track yet: run `dvc add corpus/a.txt`" in done.stderr
    dvc(own_text, "add", "corpus/a.txt")
    (own_text / "corpus/far/c.txt").write_text("c")  # DVC takes the new file along
    dvc(own_text, "exp", "run", "--temp", "-n", "copied")
    assert documents_of(own_text, "copied") == 3


@pytest.mark.robustness
def test_text_that_dvc_tracks_is_in_the_copies_of_queued_experiments(own_text):
    dvc(own_text, "add", "corpus/a.txt")
    for corpus in ("files", "hub"):
        dvc(own_text, "exp", "run", "--queue", "-n", corpus, "-S", f"download.corpus={corpus}")
    dvc(own_text, "exp", "run", "--run-all")
    assert [documents_of(own_text, corpus) for corpus in ("files", "hub")] == [1, 2]
