"""The command `compactgpt`: help, results, and mistakes as one sentence."""

import errno
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import compactgpt
from compactgpt.cli import app
from compactgpt.common.console import handle_user_errors
from compactgpt.common.errors import printable
from compactgpt.model.weights import save_model
from tests.support.dvc_projects import ROOT, git
from tests.support.tiny_models import TEXTS, save_split, save_tokenizer, tiny_gpt


def run(*words, **options):
    return CliRunner().invoke(app, list(map(str, words)), **options)


def assert_one_sentence(done, exit_code, message, before=""):
    assert done.exit_code == exit_code, done.output
    assert done.output.startswith(f"{before}error: ")
    assert done.output.count("\n") == 1 + before.count("\n")
    assert message in done.output


def commands(command, words=()):
    """All commands, with the words that call them."""
    under = getattr(command, "commands", {})
    found = [pair for name, each in under.items() for pair in commands(each, (*words, name))]
    return found if under else [(words, command)]


@pytest.mark.parametrize(("words", "command"), commands(get_command(app)))
def test_the_help_of_a_command_with_arguments_has_an_example(words, command):
    assert run(*words, "-h").output == run(*words, "--help").output != ""
    example = command.help.partition("Example: compactgpt ")[2].split() or [*words]
    assert len(example) > len(words) or not any(each.required for each in command.params)
    assert tuple(example[: len(words)]) == words
    options = {option for option in example if option.startswith("-")}
    assert options <= {name for parameter in command.params for name in parameter.opts}


def test_the_version_is_printed():
    assert run("--version").output == f"compactgpt {compactgpt.__version__}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a model and its tokenizer, and without params.yaml, as the current folder."""
    save_model(tiny_gpt(263), tmp_path / "models/compact")
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
    for words in (["-"], []):  # a pipe
        assert run("generate", *words, *options, input="the cat\n").output == first.output


@pytest.mark.parametrize(("option", "value"), [("temperature", 0), ("top_k", 1), ("seed", 7)])
def test_an_option_of_generate_does_what_it_does_in_python(project, option, value):
    text = compactgpt.load().generate("the cat", **{option: value})
    assert text != compactgpt.load().generate("the cat")
    done = run("generate", "the cat", f"--{option.replace('_', '-')}", value)
    assert done.output == printable(f"the cat{text}\n", keep="\n\t")


def test_generate_escapes_control_characters_and_asks_for_prompts_on_a_terminal(project, monkeypatch, capsys):
    assert run("generate", "\x1b[31mthe", "--max-new-tokens", 1).output.startswith("\\x1b[31mthe")
    typed = iter(["the cat", "in", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    get_command(app)(["generate", "--max-new-tokens", "1"], standalone_mode=False)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("the cat") for line in printed)
    assert printed[-1].startswith("in")


def test_generate_shows_two_models_in_columns(project):
    shutil.copytree("models/compact", "models/[b]other")
    done = run("generate", "the", "--max-new-tokens", 5, "--compare", "models/[b]other")
    assert done.exit_code == 0, done.output
    assert any("models/compact" in line and "models/[b]other" in line for line in done.output.splitlines())


def test_evaluate_prints_a_line_per_model_with_intervals_over_documents(project):
    for number, text in enumerate(TEXTS):
        (project / f"{number}.txt").write_text(text)
    (project / "bom.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    names = [path.name for path in sorted(project.glob("?.txt"))]
    expected = compactgpt.load().score(TEXTS)
    done = run("evaluate", *names, "--json")
    assert json.loads(done.stdout) == {"models/compact": json.loads(json.dumps(asdict(expected)))}
    lines = run("evaluate", *names).stdout.splitlines()
    assert lines[0].startswith(f"documents: 5; {expected.tokens} tokens, {expected.bytes} bytes")
    low, high = expected.intervals["bits_per_byte"]
    assert lines[2].endswith(f"{expected.bits_per_byte:.3f} ({low:.3f} to {high:.3f})")
    assert "models/compact predicts this text worse than a random guess" in lines[3]  # the weights are random
    single = run("evaluate", "bom.txt")
    assert "no intervals" in single.stdout
    assert run("evaluate", "-", input="the cat").stdout == single.stdout
    (project / "reports").mkdir()
    report = Path(shutil.copy(ROOT / "reports/evaluation.json", project / "reports"))
    loss = json.loads(report.read_text())["loss"]["value"]
    own = f"models/compact has {loss:.3f} nats per token on its own val documents"
    assert own in run("evaluate", "bom.txt").stdout
    (project / "long.txt").write_text("\n\n".join(["the cat sat " * 100] * 6))
    assert run("evaluate", "long.txt").stdout.startswith("long.txt: cut into 6 documents by blank lines")
    assert run("evaluate", "long.txt", "--whole").stdout.startswith("documents: 1;")


def test_evaluate_compares_models_in_the_smallest_of_their_windows(project):
    save_model(tiny_gpt(263, block_size=8), project / "models/short")
    names = ["models/compact", "models/short"]
    words = ["evaluate", "-", "--whole", *(word for name in names for word in ("--model", name))]
    text = "\n".join(TEXTS)
    scores = {name: compactgpt.load(name).score(text, window=8) for name in names}
    found = json.loads(run(*words, "--json", input=text).stdout)
    assert list(found) == names
    assert found == {name: asdict(score) for name, score in scores.items()}
    rows = run(*words, input=text).stdout.splitlines()[2:4]
    for row, (name, score) in zip(rows, scores.items(), strict=True):
        figures = f"{score.loss:.3f} {score.perplexity:,.2f} {score.bits_per_byte:.3f}"
        assert row.split() == [name, *figures.split()]


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (("evaluate", "nix.txt"), 66, "nix.txt is not a file"),
        (("evaluate", "latin.txt"), 65, "latin.txt is not UTF-8 (first wrong byte: number 4)"),
        (("generate", "x", "--model", "nix"), 66, "there is no model 'nix'"),
        (("generate", "x", "--model", "unigram"), 78, "unigram can't generate text"),
    ],
)
def test_a_mistake_of_generate_or_evaluate_is_one_sentence(project, words, exit_code, message):
    (project / "latin.txt").write_bytes(b"caf\xe9")
    shutil.copy(ROOT / "params.yaml", project)
    save_split(project / "data/tokens/train.tokens", compactgpt.load().encoding)
    before = f"loading {words[-1]} ...\n" if "--model" in words else ""
    assert_one_sentence(run(*words), exit_code, message, before)


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        ("generate x", 66, "models/compact is missing: `make repro` in the repository folder"),
        ("export hf", 66, "dvc repro"),
        ("reproduce no-such-run", 78, ""),
        ("experiment list", 66, "run from the repository folder"),
        ("estimate", 66, "run from the repository folder"),
        ("diff workspace", 66, "run from the repository folder"),
        ("gate", 66, "run from the repository folder"),
    ],
)
def test_outside_of_a_project_a_command_says_what_to_do(tmp_path, monkeypatch, words, exit_code, message):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    assert_one_sentence(run(*words.split()), exit_code, message)


def test_a_module_that_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as Python marks a module that does not exist
    with pytest.raises(SystemExit, match="66"), handle_user_errors():
        import datasets  # noqa: F401
    assert "pip install 'compactgpt[hub]'" in capsys.readouterr().err
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
