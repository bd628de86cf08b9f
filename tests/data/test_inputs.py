"""Text of params.yaml never becomes shell, and DVC never waits for a named pipe: tried with the real DVC."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common import console
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json
from compactgpt.config import load_params
from compactgpt.data.inputs import check_dependencies
from compactgpt.data.tokenizer import save_gpt2
from compactgpt.evaluation.tasks import read_lambada
from tests.support.corpora import ROOT, download_params, write_corpus

PROGRAMS = Path(sys.executable).parent
HOSTILE = [
    *("unigram$(touch X)", "unigram`touch X`", "unigram;touch X;", "unigram\ntouch X", "unigram'$(touch X)'"),
    *('unigram"$(touch X)"', "unigram | touch X", "../../unigram"),
]
COMMIT = "git -c user.name=a -c user.email=a@localhost commit -qm all"
REFUSED = "begins with a letter or digit"
FILES = download_params(corpus="files")


def run(project, *command, seconds=60):
    """Run a command in a project as a user would, without MLflow."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MAKE"))}
    known |= {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "COMPACTGPT_TRACKER": "none"}
    known |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "DVC_NO_ANALYTICS": "1"}
    options = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    return subprocess.run(list(map(str, command)), cwd=project, timeout=seconds, env=known, **options)


def set_names(project, names):
    yaml = YAML()
    tree = yaml.load(project / "params.yaml")
    tree["baseline"]["names"] = names
    tree["baseline"]["specs"] = {name: {"kind": "unigram"} for name in ["unigram", *names]}
    yaml.dump(tree, project / "params.yaml")


@pytest.fixture
def project(tmp_path):
    """A git and DVC project with the real commands of two stages, the first of which has run."""
    for name in ("params.yaml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("results", "corpus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    set_names(tmp_path, ["unigram"])
    stages = {name: read_yaml(ROOT / "dvc.yaml")["stages"][name] for name in ("estimate", "baseline")}
    for stage in stages.values():
        stage["deps"] = ["results"]  # not `corpus`: DVC would wait for a named pipe there
    YAML().dump({"stages": stages}, tmp_path / "dvc.yaml")
    (tmp_path / ".gitignore").write_text("data\nreports\n")
    for command in ("git init -q", "dvc init -q", "dvc repro -q estimate", "git add -A", COMMIT):
        done = run(tmp_path, *command.split())
        assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_a_name_with_shell_syntax_runs_no_command(project):
    """The stage `estimate` refuses it, and so do the baseline's own stage and an experiment."""
    set_names(project, HOSTILE)
    done = run(project, "dvc", "repro")
    assert done.returncode
    assert done.stderr.count(REFUSED) == 2 * len(HOSTILE)  # names and specs
    assert "Running stage 'baseline@" not in done.stdout
    done = run(project, "dvc", "repro", "-s", "-k", *(f"baseline@{name}" for name in HOSTILE[:5]))
    assert done.returncode
    assert done.stdout.count("Running stage 'baseline@") == 5
    set_names(project, ["unigram"])
    done = run(project, "dvc", "exp", "run", "-S", f"baseline.names={json.dumps(HOSTILE[:3])}")
    assert (bool(done.returncode), REFUSED in done.stderr) == (True, True)
    assert not (project / "X").exists()


def test_no_command_of_dvc_yaml_holds_text_of_params_yaml():
    for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        assert "${" not in body["cmd"], name


def test_such_a_name_is_refused_with_a_message(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_names(tmp_path, HOSTILE[:1])
    with pytest.raises(BadConfig, match=r"baseline\.names\.0: found \".*\"; a name has letters, digits"):
        load_params(tmp_path / "params.yaml")


# --- what is not a regular file


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as file:
        file.bind(os.path.relpath(path))


ODD = {
    r"odd\.txt is not a regular file": [
        os.mkfifo,
        make_socket,
        *(partial(Path.symlink_to, target=target) for target in ("/dev/zero", "odd.txt", "nowhere")),
    ],
    r"odd\.txt is a link to a folder.*`dvc add \S+ -o \S+/odd\.txt`": [lambda path: path.symlink_to("..")],
    r"corpus/'\\udcff\.txt': the file name is not UTF-8": [
        lambda path: Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff.txt")).write_text("a")
    ],
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The folder `corpus` of a project whose stage `download` depends on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a text")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    YAML().dump({"stages": {"download": {"deps": ["corpus", "missing"]}}}, tmp_path / "dvc.yaml")
    return tmp_path / "corpus"


@pytest.mark.parametrize(("message", "make"), [(key, make) for key, makers in ODD.items() for make in makers])
def test_a_file_that_dvc_can_not_read_is_refused(corpus, message, make):
    (corpus / ".other").write_text("another text")
    (corpus / "b.txt").symlink_to(".other")  # a link to a file is followed
    check_dependencies(corpus.parent)
    assert [each.source for each in write_corpus(corpus.parent, FILES)[1]] == ["corpus/a.txt", "corpus/b.txt"]
    make(corpus / "odd.txt")
    for check in (lambda: check_dependencies(corpus.parent), lambda: write_corpus(corpus.parent, FILES)):
        with pytest.raises(BadData, match=message):
            check()


def test_the_command_checks_before_dvc_hashes(corpus):
    done = CliRunner().invoke(app, ["check"])
    assert (done.exit_code, done.output) == (0, "params.yaml is valid, and DVC can read every dependency\n")
    os.mkfifo(corpus / "odd.txt")
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == BadData.exit_code
    assert done.output.startswith("error: corpus/odd.txt is not a regular file, but a named pipe")
    assert done.output.count("\n") == 1


@pytest.mark.slow
def test_the_first_stage_refuses_a_pipe_that_dvc_would_wait_for(project):
    """A bare `dvc repro` of a project that has not run, or with other parameters."""
    tree = read_yaml(project / "dvc.yaml")
    assert "data/inputs.json" in read_yaml(ROOT / "dvc.yaml")["stages"]["download"]["deps"]
    tree["stages"]["download"] = {"cmd": "touch X", "deps": ["corpus", "data/inputs.json"]}
    YAML().dump(tree, project / "dvc.yaml")
    os.mkfifo(project / "corpus/odd.txt")
    (project / "dvc.lock").unlink()
    done = run(project, "dvc", "repro", "download")
    assert done.returncode
    assert "error: corpus/odd.txt is not a regular file" in done.stderr
    assert not (project / "X").exists()


def test_line_ends_are_those_that_dvc_hashed_in_every_clone():
    command = ["git", "check-attr", "eol", "params.yaml", "src/compactgpt/config.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "params.yaml: eol: lf\nsrc/compactgpt/config.py: eol: lf\n"


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
