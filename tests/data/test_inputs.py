"""Text of params.yaml never becomes shell, and DVC never waits for a named pipe: tried with the real DVC."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig, BadData, MissingInput, printable
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json
from compactgpt.config import load_params
from compactgpt.data.inputs import check_dependencies, check_files
from compactgpt.data.tokenizer import save_gpt2
from compactgpt.evaluation.tasks import read_lambada
from compactgpt.evaluation.wikitext import read_lines
from tests.support.corpora import download_params, write_corpus

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
HOSTILE = [
    "unigram$(touch X)",
    "unigram`touch X`",
    "unigram;touch X;",
    "unigram\ntouch X",
    "unigram'$(touch X)'",
    "unigram'`touch X`'",
    'unigram"$(touch X)"',
    "unigram | touch X",
    "../../unigram",
]
PRINTING = {"print", "typer.echo", "sys.stdout.write", "sys.stdout.writelines", "sys.stderr.write"}
FILES = download_params(corpus="files")
SOME = ("estimate", "baseline")  # stages of the real dvc.yaml that the project has


def run(project, *command, seconds=60):
    """Run a command in a project as a user would, without MLflow."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MAKE"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=project,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds,
        env={
            **known,
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
            "COMPACTGPT_TRACKER": "none",
            "DVC_NO_ANALYTICS": "1",
        },
    )


def set_names(project, names):
    yaml = YAML()
    tree = yaml.load(project / "params.yaml")
    tree["baseline"]["names"] = names
    tree["baseline"]["specs"] = {"unigram": {"kind": "unigram"}} | {
        name: {"kind": "unigram"} for name in names
    }
    yaml.dump(tree, project / "params.yaml")


@pytest.fixture
def project(tmp_path):
    """A git and DVC project with the real commands of two stages, the first of which has run."""
    for name in ("params.yaml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("data/tokens", "results", "corpus"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("a")
    set_names(tmp_path, ["unigram"])
    stages = {name: body for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items() if name in SOME}
    for body in stages.values():
        made = "data/inputs.json" in body["deps"] or body is stages["baseline"]
        body["deps"] = ["data/tokens", "data/inputs.json"] if made else ["results", "corpus"]
    stages["estimate"]["deps"].remove("corpus")
    stages["baseline"]["deps"] = [
        name for name in stages["baseline"]["deps"] if name in json.dumps(read_yaml(ROOT / "dvc.yaml"))
    ]
    YAML().dump({"stages": stages}, tmp_path / "dvc.yaml")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "repro", "-q", "estimate"]):
        done = run(tmp_path, *command)
        assert done.returncode == 0, done.stderr
    (tmp_path / ".gitignore").write_text("data\nreports\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["add", "-A"], [*author, "commit", "-qm", "all"]):
        assert run(tmp_path, "git", *command).returncode == 0
    return tmp_path


@pytest.mark.slow
def test_a_name_with_shell_syntax_runs_no_command(project):
    """Where an earlier stage refuses it, and where DVC is told to run the stage alone."""
    set_names(project, HOSTILE)
    done = run(project, "dvc", "repro")
    assert done.returncode
    assert not (project / "X").exists()
    assert done.stderr.count("begins with a letter or digit") == 2 * len(HOSTILE)  # names and specs
    assert "Running stage 'baseline@" not in done.stdout
    set_names(project, ["unigram"])
    assert run(project, "dvc", "repro", "-q", "estimate").returncode == 0
    set_names(project, HOSTILE)
    done = run(project, "dvc", "repro", "-s", "-k", *(f"baseline@{name}" for name in HOSTILE[:5]))
    assert done.returncode
    assert done.stdout.count("Running stage 'baseline@") == 5
    assert not (project / "X").exists()
    done = run(project, "make", "-o", PROGRAMS.parent / ".installed", "repro", f"VENV={PROGRAMS.parent}")
    assert done.returncode
    assert "begins with a letter or digit" in done.stderr
    assert "Running stage" not in done.stdout
    assert not (project / "X").exists()


@pytest.mark.slow
def test_an_experiment_with_such_a_name_runs_no_command(project):
    names = json.dumps(HOSTILE[:3])
    done = run(project, "dvc", "exp", "run", "-S", f"baseline.names={names}")
    assert done.returncode
    assert "begins with a letter or digit" in done.stderr
    assert not (project / "X").exists()


def test_no_command_of_dvc_yaml_holds_text_of_params_yaml():
    for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        assert "${" not in body["cmd"], name


@pytest.mark.parametrize("name", HOSTILE)
def test_such_a_name_is_refused_in_a_sentence(tmp_path, name):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_names(tmp_path, [name])
    with pytest.raises(BadConfig, match=r"baseline\.names\.0: found \".*\"; a name has letters, digits"):
        load_params(tmp_path / "params.yaml")


# --- files that are none


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as file:
        file.bind(os.path.relpath(path))


ODD = {
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": socket_at,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop of symbolic links": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.symlink_to(".."),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a text")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    YAML().dump({"stages": {"download": {"deps": ["corpus", "missing"]}}}, tmp_path / "dvc.yaml")
    return tmp_path / "corpus"


@pytest.mark.parametrize("kind", sorted(set(ODD) - {"a folder"}))
def test_a_file_that_dvc_can_not_read_is_refused_by_its_kind(corpus, kind):
    check_dependencies(corpus.parent)
    ODD[kind](corpus / "odd.txt")
    for check in (check_files, lambda folder: check_dependencies(folder.parent)):
        with pytest.raises((BadData, MissingInput), match=rf"corpus/odd\.txt is .*{kind}"):
            check(corpus)
    with pytest.raises((BadData, MissingInput), match=rf"^corpus/odd\.txt is .*{kind}"):
        write_corpus(corpus.parent, FILES)


def test_links_that_dvc_follows_or_passes_over_are_allowed(corpus):
    (corpus / ".other").write_text("another text")
    (corpus / "b.txt").symlink_to(".other")
    (corpus / "up").symlink_to("..")
    (corpus / "self").symlink_to(".")
    check_files(corpus)
    assert [each.source for each in write_corpus(corpus.parent, FILES)[1]] == ["corpus/a.txt", "corpus/b.txt"]


def test_a_name_that_is_not_utf8_is_refused(corpus):
    Path(os.fsdecode(os.fsencode(corpus) + b"/\xff.bin")).write_text("a")
    with pytest.raises(BadData, match=r"corpus/'\\udcff\.bin': the file name is not UTF-8"):
        check_files(corpus)


def test_the_command_checks_before_dvc_hashes(corpus):
    done = CliRunner().invoke(app, ["check"])
    assert (done.exit_code, done.output) == (0, "params.yaml is valid, and DVC can read every dependency\n")
    os.mkfifo(corpus / "odd.txt")
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == BadData.exit_code
    assert done.output.startswith("error: corpus/odd.txt is a named pipe")
    assert done.output.count("\n") == 1


@pytest.mark.slow
def test_the_first_stage_refuses_a_pipe_where_dvc_would_wait_for_it(project):
    """A bare `dvc repro` of a project that has not run, or with other parameters."""
    tree = read_yaml(project / "dvc.yaml")
    deps = [
        "corpus",
        *(d for d in read_yaml(ROOT / "dvc.yaml")["stages"]["download"]["deps"] if d == "data/inputs.json"),
    ]
    tree["stages"]["download"] = {"cmd": "touch X", "deps": deps}
    YAML().dump(tree, project / "dvc.yaml")
    os.mkfifo(project / "corpus/odd.txt")
    (project / "dvc.lock").unlink()
    done = run(project, "dvc", "repro", "download", seconds=30)
    assert done.returncode
    assert "error: corpus/odd.txt is a named pipe" in done.stderr
    assert not (project / "X").exists()


# --- terminal escapes


def test_control_characters_are_shown_escaped():
    assert printable("été\u202f1 😀", keep="\n") == "été\u202f1 😀"
    assert printable("a\x1b[2J\r\nb\u202e\udcff\x9b", keep="\n") == "a\\x1b[2J\\r\nb\\u202e\\udcff\\x9b"
    assert printable("a\nb\t") == "a\\nb\\t"


def test_a_file_name_with_terminal_escapes_is_shown_escaped(corpus):
    (corpus / "\x1b[2J\nerror: b.txt").write_bytes(b"\xff")
    with pytest.raises(BadData) as caught:
        write_corpus(corpus.parent, FILES)
    assert str(caught.value).startswith("corpus/\\x1b[2J\\nerror: b.txt, line 1: byte 0xff is not UTF-8")


def test_messages_and_results_are_printed_by_one_function(capsys):
    from compactgpt.common import console

    console.report("\x1b[2J")
    console.report("\x1b]0;title\x07")
    console.echo("\x9b31m")
    printed = capsys.readouterr()
    assert printed.err == "error: \\x1b[2J\n\\x1b]0;title\\x07\n"
    assert printed.out == "\\x9b31m\n"


def test_nothing_is_printed_past_that_function():
    """But for a table in colour, whose escapes are its own, and the annotations that GitHub reads."""
    allowed = {"console.py": 2, "comparison.py": 1, "formats.py": 1, "harness.py": 1}
    found = {}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        printed = [call for call in calls if call in PRINTING]
        if printed and len(printed) > allowed.get(path.name, 0):
            found[path.name] = printed
    assert not found, "print with compactgpt.common.console.echo or report"


# --- JSON nested beyond what Python reads


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    nested = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(nested)
    for read in (
        lambda: write_corpus(tmp_path, download_params(corpus="files", files={"patterns": ["a.jsonl"]})),
        lambda: read_lambada(tmp_path / "a.jsonl"),
        lambda: read_lines(tmp_path / "a.jsonl"),
        lambda: save_gpt2(tmp_path / "tokenizer", b"#version\n", nested.encode()),
        lambda: read_json(tmp_path / "a.jsonl"),
    ):
        with pytest.raises(BadData):
            read()
