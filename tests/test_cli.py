"""The command `compactgpt`: help, completion, and mistakes as one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import compactgpt
from compactgpt.cli import app
from compactgpt.common.console import extra_with, handle_user_errors
from compactgpt.common.errors import printable
from compactgpt.model.weights import save_model
from tests.support.dvc_projects import ENVIRONMENT, ROOT, git
from tests.support.tiny_models import TEXTS, save_split, save_tokenizer, tiny_gpt


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def assert_one_sentence(done, exit_code):
    assert done.exit_code == exit_code, done.output
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1


def commands(command, words=()):
    """All commands that are not hidden, with the words that call them."""
    under = getattr(command, "commands", {})
    found = [pair for name, each in under.items() for pair in commands(each, (*words, name))]
    return found if under else [(words, command)] if not command.hidden else []


@pytest.mark.parametrize(("words", "command"), commands(get_command(app)))
def test_the_help_of_a_command_says_what_it_prints_and_writes_with_an_example(words, command):
    assert {"Prints", "Writes", "Example:"} <= set(command.help.replace("\n", " ").split())
    example = command.help.split("Example: compactgpt ")[1].split()
    assert tuple(example[: len(words)]) == words
    options = {option for option in example if option.startswith("-")}
    assert options <= {name for parameter in command.params for name in parameter.opts}


def test_short_help_version_and_old_names():
    assert run("--version").output == f"compactgpt {compactgpt.__version__}\n"
    for words in ((), ("gate",), ("experiment",), ("experiment", "run")):
        assert run(*words, "-h").output == run(*words, "--help").output != ""
    for old in ("mend", "ladder"):  # wording: quoted
        assert run(old, "--help").exit_code == 0
        assert f" {old} " not in run("--help").output


def test_an_exported_model_is_loaded_by_transformers(tmp_path):
    import transformers

    model = tiny_gpt(40)
    save_model(model, tmp_path / "compact", {})
    save_tokenizer(tmp_path / "tokenizer")
    options = ["--model", tmp_path / "compact", "--tokenizer", tmp_path / "tokenizer"]
    done = run("export", tmp_path / "hf", *options)
    assert done.exit_code == 0, done.output
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(loaded.transformer.wte.weight, model.wte.weight[:40])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a model and its tokenizer, and without params.yaml, as the current folder."""
    save_model(tiny_gpt(263), tmp_path / "models/compact", {})
    save_tokenizer(tmp_path / "data/tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_prints_the_prompt_and_its_continuation(project):
    options = ["--max-new-tokens", 9]
    first = run("generate", "the cat", *options)
    continuation = compactgpt.load().generate("the cat", max_new_tokens=9)
    assert first.output == printable(f"the cat{continuation}\n", keep="\n\t")
    samples = run("generate", "the cat", *options, "--num-samples", 2).output.split("---\n")
    assert samples[0] == first.output
    assert samples[1].startswith("the cat")
    assert samples[1] != first.output
    greedy = run("generate", "the cat", *options, "--temperature", 0).output
    assert greedy == run("generate", "the cat", *options, "--top-k", 1, "--seed", 7).output
    for words in (["-"], []):  # a pipe
        typed = CliRunner().invoke(app, ["generate", *words, *map(str, options)], input="the cat\n")
        assert typed.output == first.output


def test_generate_escapes_control_characters_and_asks_for_prompts_on_a_terminal(project, monkeypatch, capsys):
    assert run("generate", "\x1b[31mthe", "--max-new-tokens", 1).output.startswith("\\x1b[31mthe")
    typed = iter(["the cat", "in", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    get_command(app)(["generate", "--max-new-tokens", "1"], standalone_mode=False)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("the cat") for line in printed)
    assert printed[-1].startswith("in")


@pytest.mark.parametrize(("width", "columns"), [(100, 2), (60, 1)])
def test_generate_shows_two_models_in_columns_if_the_terminal_is_wide(project, monkeypatch, width, columns):
    shutil.copytree("models/compact", "models/[b]other")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["generate", "the", "--max-new-tokens", 5, "--compare", "models/[b]other"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any("models/compact" in line and "models/[b]other" in line for line in lines) == (columns == 2)
    assert ("--- models/[b]other" in lines) == (columns == 1)


def test_evaluate_prints_a_line_per_model_with_intervals_over_documents(project):
    for number, text in enumerate(TEXTS):
        (project / f"{number}.txt").write_text(text)
    (project / "bom.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    shutil.copytree("models/compact", "other")
    names = [path.name for path in sorted(project.glob("?.txt"))]
    expected = compactgpt.load().score(TEXTS)
    done = run("evaluate", *names, "--json")
    assert json.loads(done.stdout) == {"models/compact": json.loads(json.dumps(asdict(expected)))}
    lines = run("evaluate", *names, "--model", "models/compact", "--model", "other").stdout.splitlines()
    assert lines[0].startswith(f"documents: 5; {expected.tokens} tokens, {expected.bytes} bytes")
    low, high = expected.intervals["bits_per_byte"]
    assert lines[2].endswith(f"{expected.bits_per_byte:.3f} ({low:.3f} to {high:.3f})")
    assert lines[3].split()[1:] == lines[2].split()[1:]
    single = run("evaluate", "bom.txt")
    assert "no intervals" in single.stdout
    piped = CliRunner().invoke(app, ["evaluate", "-"], input="the cat")
    assert piped.stdout == single.stdout


def test_evaluate_cuts_a_file_into_documents_as_the_pipeline_does(project):
    shutil.copy(ROOT / "params.yaml", project)
    (project / "a.txt").write_text("the cat\n\nin the hat\n\nthen")
    expected = compactgpt.load().score(["the cat", "in the hat", "then"])
    done = run("evaluate", "a.txt", "--split", "blank-lines", "--json")
    assert json.loads(done.stdout)["models/compact"]["loss"] == expected.loss
    assert json.loads(done.stdout)["models/compact"]["documents"] == 3
    for split, message in (("words", "'blank-lines'"), ("heading", "write the regular expression")):
        refused = run("evaluate", "a.txt", "--split", split)
        assert refused.exit_code == 78
        assert message in refused.output


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("evaluate", "nix.txt"), 66, "nix.txt is not a file"),
        (("evaluate", "latin.txt"), 65, "latin.txt is not UTF-8 (byte 3)"),
        (("generate", "x", "--model", "nix"), 66, "there is no model 'nix'"),
        (("generate", "x", "--tokenizer", "nix"), 66, "nix"),
    ],
)
def test_a_mistake_of_generate_or_evaluate_is_one_sentence(project, words, exit_code, message):
    (project / "latin.txt").write_bytes(b"caf\xe9")
    done = run(*words)
    assert_one_sentence(done, exit_code)
    assert message in done.output


def test_a_model_that_cannot_generate_is_refused_before_the_prompt_is_printed(project):
    shutil.copy(ROOT / "params.yaml", project)
    save_split(project / "data/tokens/train.tokens", compactgpt.load().encoding)
    done = run("generate", "the", "--model", "unigram")
    assert_one_sentence(done, 78)
    assert "unigram can't generate text" in done.output


def test_without_a_model_the_command_says_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("generate", "x"), ("evaluate", __file__)):
        done = run(*words)
        assert_one_sentence(done, 66)
        assert "`make repro` trains it" in done.output


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("export", "hf"), 66, "dvc repro"),
        (("reproduce", "workspace"), 78, ""),
        (("reproduce", "no-such-run"), 78, ""),
        (("diff", "nothing"), 78, ""),
        (("experiment", "list"), 66, "run from the repository folder"),
        (("experiment", "show", "note"), 66, "run from the repository folder"),
        (("estimate",), 66, "run from the repository folder"),
        (("diff", "workspace"), 66, "run from the repository folder"),
        (("gate",), 66, "run from the repository folder"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_do(tmp_path, monkeypatch, words, exit_code, message):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    done = run(*words)
    assert_one_sentence(done, exit_code)
    assert message in done.output


def test_an_estimate_ends_with_the_command_that_runs_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    last = run("estimate", "-S", "training.max_steps=9").output.splitlines()[-1]
    assert last == "next: dvc exp run -S training.max_steps=9"


def test_an_experiment_without_dvc_is_refused_before_anything_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    before = (ROOT / "params.yaml").read_bytes()
    monkeypatch.chdir(ROOT)
    done = run("experiment", "run", "demo")
    assert done.exit_code == 66
    assert "compactgpt[pipeline]" in done.output
    assert (ROOT / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "pipeline"), ("datasets", "hub")])
def test_a_module_that_is_not_installed_is_named_with_its_extra(module, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as Python marks a module that does not exist
    with pytest.raises(SystemExit, match="66"), handle_user_errors():
        __import__(module)
    assert f"pip install 'compactgpt[{extra}]'" in capsys.readouterr().err
    assert extra_with(f"{module}.part") == extra
    with pytest.raises(ModuleNotFoundError), handle_user_errors():  # which no extra has: a bug
        import no_such_module  # noqa: F401


@pytest.mark.parametrize(
    ("number", "exit_code"), [(errno.EROFS, 77), (errno.EACCES, 77), (errno.ENOSPC, 73), (errno.EIO, 74)]
)
def test_an_error_of_the_system_is_one_sentence(number, exit_code, capsys):
    with pytest.raises(SystemExit, match=str(exit_code)), handle_user_errors():
        raise OSError(number, os.strerror(number), "params.yaml")
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "params.yaml" in printed
    assert printed.count("\n") == 1


def run_python(code, folder=ROOT, prefix=(), **environment):
    around = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("COVERAGE_", "MLFLOW"))
    }
    words = [*prefix, sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}"]
    return subprocess.run(
        words, env={**around, **environment}, cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("from compactgpt.cli import app; app(['sync'])", 77, "error: "),
        (
            "from pathlib import Path; from compactgpt.tracking.store import run_of_value\n"
            "print(run_of_value(Path(), 'evaluation'))",
            0,
            "not looked up: SQLite writes next to mlflow.db, and this folder is read-only",
        ),
    ],
)
def test_in_a_read_only_folder_a_command_says_so_in_one_sentence(tmp_path, code, exit_code, message):
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    if exit_code == 0:
        (tmp_path / "mlflow.db").touch()
    prefix = []
    if os.geteuid() == 0:  # file modes do not bind root, mounts do
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
        prefix = ["unshare", "-m", "sh", "-c", mount, str(tmp_path)]
        if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("this user may not mount here")
    else:
        tmp_path.chmod(0o555)
    done = run_python(code, tmp_path, prefix)
    printed = done.stdout + done.stderr
    assert (done.returncode, printed.count("\n")) == (exit_code, 1)
    assert printed.startswith(message)


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}),
        ("zsh", lambda words: {"_TYPER_COMPLETE_ARGS": words}),
        ("fish", lambda words: {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_tab_completes_commands_and_experiments(shell, asked):
    code = "from compactgpt.cli import app; app(prog_name='compactgpt')"

    def offered(words):
        wanted = {"_COMPACTGPT_COMPLETE": f"complete_{shell}", **asked(words)}
        printed = run_python(code, **wanted).stdout
        return {name for name in ("export", "experiment", "note", "demo") if name in printed}

    assert offered("compactgpt exp") == {"export", "experiment"}
    assert offered("compactgpt experiment show n") == {"note"}
    script = run_python(code, _COMPACTGPT_COMPLETE=f"source_{shell}").stdout  # as --show-completion
    assert f"_COMPACTGPT_COMPLETE=complete_{shell}" in script.replace('"', "")


def test_help_takes_less_than_a_second():
    """Of the command and of each stage script; tests/test_architecture.py holds what they import."""
    code = """
import importlib, pathlib, time
from typer.testing import CliRunner
for module in ["compactgpt.cli", *(f"stages.{p.stem}" for p in pathlib.Path("stages").glob("[a-z]*.py"))]:
    app = importlib.import_module(module).app
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0, module
print(time.process_time())
"""
    done = run_python(code)
    assert float(done.stdout or "nan") < 2, done.stderr  # all of them
