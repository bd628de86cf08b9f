"""Text of params.yaml never becomes shell, and DVC never waits for a named pipe: tried with the real DVC."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common import console
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json, write_text
from compactgpt.config import load_params
from compactgpt.data.inputs import check_dependencies
from compactgpt.data.tokenizer import save_gpt2
from compactgpt.evaluation.tasks import read_lambada
from stages.download import app as download_app
from tests.support.corpora import ROOT, download_params, write_corpus
from tests.support.dvc_projects import ENVIRONMENT, dvc, git, git_repository

HOSTILE = [
    *("unigram$(touch X)", "unigram`touch X`", "unigram;touch X;", "unigram\ntouch X", "unigram'$(touch X)'"),
    *('unigram"$(touch X)"', "unigram | touch X", "../../unigram"),
]
REFUSED = "begins with a letter or digit"
FILES = download_params(corpus="files")


def fails(project, *command):
    """Run a command that must fail, and must not wait for a named pipe; return its result."""
    options = {"capture_output": True, "text": True, "check": False, "timeout": 60}
    done = subprocess.run(command, cwd=project, env=ENVIRONMENT, **options)
    assert done.returncode
    return done


def set_names(project, names):
    tree = read_yaml(ROOT / "params.yaml")
    specs = {name: {"kind": "unigram"} for name in ["unigram", *names]}
    tree["baseline"] |= {"names": names, "specs": specs}
    YAML().dump(tree, project / "params.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git and DVC project with the real commands of two stages, the first of which has run."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'src'}")
    monkeypatch.setitem(ENVIRONMENT, "COMPACTGPT_TRACKER", "none")
    stages = {name: read_yaml(ROOT / "dvc.yaml")["stages"][name] for name in ("estimate", "baseline")}
    for stage in stages.values():
        stage["deps"] = ["results"]  # not `corpus`: DVC would wait for a named pipe there
    project = git_repository(tmp_path / "project", stages)
    set_names(project, ["unigram"])
    for name in ("results", "corpus"):
        write_text(project / name / "a.txt", "a")
    (project / ".gitignore").write_text("data\nreports\n")
    dvc(project, "repro", "-q", "estimate")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "all")
    return project


@pytest.mark.slow
def test_a_name_with_shell_syntax_runs_no_command(project):
    """The stage `estimate` refuses it, and so do the baseline's own stage and an experiment."""
    set_names(project, HOSTILE)
    done = fails(project, "dvc", "repro")
    assert done.stderr.count(REFUSED) == 2 * len(HOSTILE)  # names and specs
    assert "Running stage 'baseline@" not in done.stdout
    done = fails(project, "dvc", "repro", "-s", "-k", *(f"baseline@{name}" for name in HOSTILE[:5]))
    assert done.stdout.count("Running stage 'baseline@") == 5
    set_names(project, ["unigram"])
    done = fails(project, "dvc", "exp", "run", "-S", f"baseline.names={json.dumps(HOSTILE[:3])}")
    assert REFUSED in done.stderr
    assert not (project / "X").exists()


def test_no_command_of_dvc_yaml_holds_text_of_params_yaml():
    for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        assert "${" not in body["cmd"], name


def test_such_a_name_is_refused_with_a_message(tmp_path):
    set_names(tmp_path, HOSTILE[:1])
    with pytest.raises(BadConfig, match=r"baseline\.names\.0: found \".*\"; a name has letters, digits"):
        load_params(tmp_path / "params.yaml")


# --- what is not a regular file


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as file:
        file.bind(os.path.relpath(path))


ODD = r"odd\.txt is not a regular file"
LINK = r"odd\.txt is a link to a folder.*`dvc add \S+ -o \S+/odd\.txt`"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The folder `corpus` of a project whose stage `download` depends on it."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "corpus/a.txt", "a text")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    YAML().dump({"stages": {"download": {"deps": ["corpus", "missing"]}}}, tmp_path / "dvc.yaml")
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (ODD, os.mkfifo),
        (ODD, make_socket),
        *((ODD, partial(Path.symlink_to, target=target)) for target in ("/dev/zero", "odd.txt", "nowhere")),
        (LINK, partial(Path.symlink_to, target="..")),
        (r"'\\udcff\.txt': the file name is not UTF-8", lambda path: open(b"corpus/\xff.txt", "x").close()),
    ],
)
def test_a_file_that_dvc_can_not_read_is_refused(corpus, message, make):
    (corpus / ".other").write_text("another text")
    (corpus / "b.txt").symlink_to(".other")  # a link to a file is followed
    check_dependencies(corpus.parent)
    assert [each.source for each in write_corpus(corpus.parent, FILES)[1]] == ["corpus/a.txt", "corpus/b.txt"]
    make(corpus / "odd.txt")
    for check in (lambda: check_dependencies(corpus.parent), lambda: write_corpus(corpus.parent, FILES)):
        with pytest.raises(BadData, match=message):
            check()


def test_the_command_checks_before_dvc_hashes_and_estimates_the_time_of_the_first_run(corpus, monkeypatch):
    monkeypatch.setattr("compactgpt.doctor.measure_speed", lambda params: 1e11)
    ready = "params.yaml is valid, and DVC can read every dependency\n"
    done = CliRunner().invoke(app, ["check"])
    time = r"time: about [\d.]+ min \(training [\d.]+ min\b.*\), and a minute or two for the other stages\n"
    assert done.exit_code == 0
    assert re.fullmatch(re.escape(ready) + time, done.output)
    Path(".state/seconds").mkdir(parents=True)
    done = CliRunner().invoke(app, ["check"])
    assert (done.exit_code, done.output) == (0, ready)
    os.mkfifo(corpus / "odd.txt")
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == BadData.exit_code
    assert re.fullmatch(r"error: corpus/odd\.txt is not a regular file, but a named pipe.*\n", done.output)


@pytest.mark.slow
def test_the_first_stage_refuses_a_pipe_that_dvc_would_wait_for(project):
    """A bare `dvc repro` of a project that has not run, or with other parameters."""
    tree = read_yaml(project / "dvc.yaml")
    assert "data/inputs.json" in read_yaml(ROOT / "dvc.yaml")["stages"]["download"]["deps"]
    tree["stages"]["download"] = {"cmd": "touch X", "deps": ["corpus", "data/inputs.json"]}
    YAML().dump(tree, project / "dvc.yaml")
    os.mkfifo(project / "corpus/odd.txt")
    (project / "dvc.lock").unlink()
    done = fails(project, "dvc", "repro", "download")
    assert "error: corpus/odd.txt is not a regular file" in done.stderr
    assert not (project / "X").exists()


@pytest.mark.parametrize(
    ("kind", "file", "mirror", "message"),
    [
        ("files", None, None, "lacks corpus/a.txt corpus/b, .*: run `dvc add corpus/a.txt corpus/b`, then"),
        ("hub", "corpus/a.txt", None, "lacks corpus/a.txt, .*: run `dvc add corpus/a.txt`, then"),
        ("hub", "corpus/b/b.txt", None, "lacks corpus/b, .*: run `dvc add corpus/b`, then"),
        ("hub", None, "corpus/b", "lacks corpus/b, .*: run `dvc add corpus/b`, then"),
        ("hub", "corpus/a.txt", "far", r"lacks far: write the absolute path /\S+/far to params.yaml"),
    ],
)
def test_text_that_the_copy_of_an_experiment_lacks_is_named(corpus, monkeypatch, kind, file, mirror, message):
    """git ignores the text, and the folder in which `dvc exp run --temp` runs has what git and DVC track."""
    original, copy = corpus.parent, corpus.parent / ".dvc/tmp/exps/copy"
    for path in (original / "corpus/b/b.txt", original / "far/c.txt", copy / "corpus/README.md"):
        write_text(path, "a text")
    tree = read_yaml(ROOT / "params.yaml")
    hub = tree["download"]["hub"]
    hub |= {"name": "tiny-shakespeare", "mirror": mirror}
    hub["sets"]["tiny-shakespeare"]["file"] = file
    tree["download"]["corpus"] = kind
    YAML().dump(tree, copy / "params.yaml")
    shutil.copy(original / "dvc.yaml", copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(original))
    done = CliRunner().invoke(download_app, ["--tracker", "none"])
    assert done.exit_code == MissingInput.exit_code
    assert re.match(f"error: the experiment's copy of the repository {message}", done.output)


def test_line_ends_are_those_that_dvc_hashed_in_every_clone():
    found = git(ROOT, "check-attr", "eol", "params.yaml", "src/compactgpt/config.py")
    assert found == "params.yaml: eol: lf\nsrc/compactgpt/config.py: eol: lf\n"


# --- terminal escapes


def test_control_characters_are_printed_as_escapes(corpus, capsys):
    console.report("\x1b]0;title\x07")
    console.echo("\x9b31m")
    assert tuple(capsys.readouterr()) == ("\\x9b31m\n", "\\x1b]0;title\\x07\n")
    (corpus / "\x1b[2J\nerror: b.txt").write_bytes(b"\xff")
    with pytest.raises(BadData, match=r"^corpus/\\x1b\[2J\\nerror: b\.txt, line 1: byte 0xff is not UTF-8"):
        write_corpus(corpus.parent, FILES)


def test_only_console_prints():
    """Except for a table in colour, whose escapes are its own; a message to another process is no print."""
    printing = {"print", "typer.echo", "sys.stdout.write", "sys.stdout.writelines", "sys.stderr.write"}
    allowed = {"console.py": 2, "comparison.py": 1}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        calls = [call for call in calls if not any("stdin" in ast.unparse(word) for word in call.keywords)]
        printed = [call for call in calls if ast.unparse(call.func) in printing]
        assert len(printed) <= allowed.get(path.name, 0), f"{path}: print with console.echo or console.report"


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    nested = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(nested)
    for read in (
        lambda: write_corpus(tmp_path, download_params(corpus="files", files={"patterns": ["a.jsonl"]})),
        lambda: read_lambada(tmp_path / "a.jsonl"),
        lambda: save_gpt2(tmp_path / "tokenizer", b"#version\n", nested.encode()),
        lambda: read_json(tmp_path / "a.jsonl"),
    ):
        with pytest.raises(BadData):
            read()
