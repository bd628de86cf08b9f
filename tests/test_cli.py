"""The command: one call a command, mistakes as one sentence."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import compactgpt
from compactgpt.cli import app
from compactgpt.common.console import extra_with, handle_user_errors
from compactgpt.training.checkpoint import save_model
from tests.support import tracking_store
from tests.support.comparison_inputs import ROOT
from tests.support.tiny_models import save_tokenizer, tiny_gpt


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_an_exported_model_is_loaded_by_transformers(tmp_path):
    import transformers

    model = tiny_gpt(40)
    save_model(model, tmp_path / "compact", {})
    save_tokenizer(tmp_path / "tokenizer")
    done = run(
        "export", tmp_path / "hf", "--model", tmp_path / "compact", "--tokenizer", tmp_path / "tokenizer"
    )
    assert done.exit_code == 0, done.output
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(loaded.transformer.wte.weight, model.wte.weight[:40])


def test_a_command_without_its_input_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("export", "hf")
    assert done.exit_code == 66
    assert "dvc repro" in done.output
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "words", [("reproduce", "workspace"), ("diff", "nothing"), ("reproduce", "no-such-run")]
)
def test_a_version_that_is_none_is_refused_in_one_sentence(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    tracking_store.git(tmp_path, "init", "-q")
    tracking_store.git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    done = run(*words)
    assert done.exit_code == 78
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "pipeline"), ("datasets", "hub")])
def test_what_is_not_installed_is_said_with_its_extra(module, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # as Python says that there is none
    with pytest.raises(SystemExit, match="66"), handle_user_errors():
        __import__(module)
    assert f"pip install 'compactgpt[{extra}]'" in capsys.readouterr().err
    assert extra_with(f"{module}.part") == extra


def test_a_module_that_no_extra_brings_is_a_bug_of_ours():
    assert extra_with("no_such_module") == ""
    with pytest.raises(ModuleNotFoundError), handle_user_errors():
        import no_such_module  # noqa: F401


def test_an_experiment_without_dvc_is_refused_before_anything_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    before = (ROOT / "params.yaml").read_bytes()
    monkeypatch.chdir(ROOT)
    done = run("experiment", "run", "note")
    assert done.exit_code == 66
    assert "compactgpt[pipeline]" in done.output
    assert (ROOT / "params.yaml").read_bytes() == before


def in_a_process_of_its_own(code, **environment):
    words = [sys.executable, "-c", f"from compactgpt.cli import app\n{code}"]
    around = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}  # its cost
    done = subprocess.run(
        words, env={**around, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}),
        ("zsh", lambda words: {"_TYPER_COMPLETE_ARGS": words}),
        ("fish", lambda words: {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_tab_completes_commands_and_experiments(shell, asked):
    def offered(words):
        wanted = {"_COMPACTGPT_COMPLETE": f"complete_{shell}", **asked(words)}
        told = " ".join(in_a_process_of_its_own("app(prog_name='compactgpt')", **wanted))
        return {name for name in ("export", "experiment", "note", "demo") if name in told}

    assert offered("compactgpt exp") == {"export", "experiment"}
    assert offered("compactgpt experiment show n") == {"note"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_each_shell_can_be_had(shell):
    asked = {"_COMPACTGPT_COMPLETE": f"source_{shell}"}  # as --show-completion, which looks for the shell
    script = " ".join(in_a_process_of_its_own("app(prog_name='compactgpt')", **asked))
    assert f"_COMPACTGPT_COMPLETE=complete_{shell}" in script


def test_every_command_and_door_answers_help_in_less_than_a_second_and_loads_nothing_heavy():
    code = """
import importlib, pathlib, sys, time
from typer.main import get_command
from typer.testing import CliRunner
heavy = ["mlflow", "dvc", "great_expectations", "transformers", "datasets", "pandas", "pyarrow", "scipy"]
begun = time.process_time()
def ask(app, command, words):
    for name, under in getattr(command, "commands", {}).items():
        ask(app, under, [*words, name])
    before = time.process_time()
    assert CliRunner().invoke(app, [*words[1:], "--help"]).exit_code == 0, words
    loaded = [name for name in [*heavy, "torch", "matplotlib", "numpy"] if name in sys.modules]
    assert not loaded, (words, loaded)
    print("_".join(words), begun + time.process_time() - before)  # start, and this one
ask(app, get_command(app), ["compactgpt"])
for door in sorted(path.stem for path in pathlib.Path("stages").glob("[a-z]*.py")):
    before = time.process_time()
    module = importlib.import_module(f"stages.{door}")
    begun += time.process_time() - before
    if door != "_runner":
        ask(module.app, get_command(module.app), [door])
"""
    told = in_a_process_of_its_own(code)
    seconds = dict(zip(told[::2], map(float, told[1::2]), strict=True))
    doors = {path.stem for path in (ROOT / "stages").glob("[a-z]*.py")}
    assert {"compactgpt", "compactgpt_gate", "compactgpt_experiment_show", *doors} <= set(seconds)
    assert max(seconds.values()) < 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_one_sentence(number, capsys):
    with pytest.raises(SystemExit, match="77"), handle_user_errors():
        raise OSError(number, os.strerror(number), "params.yaml")
    said = capsys.readouterr().err
    assert said.startswith(f"error: params.yaml: {os.strerror(number)}: run in a folder")
    assert said.count("\n") == 1


def told_in_a_read_only_folder(folder, code):
    """Exit code and words of a program whose folder may not be written; modes bind no root, mounts do."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {code}"]
    if os.geteuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
        tried = ["unshare", "-m", "sh", "-c", mount, str(folder)]
        if not shutil.which("unshare") or subprocess.run([*tried, "true"], check=False).returncode:
            pytest.skip("nothing may be mounted here")
        command = [*tried, *command]
    else:
        folder.chmod(0o555)
    plain = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_in_a_read_only_folder_sync_says_so_in_one_sentence(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    code, said = told_in_a_read_only_folder(tmp_path, "from compactgpt.cli import app; app(['sync'])")
    assert code == 77
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "Read-only file system" in said or "Permission denied" in said


def test_in_a_read_only_folder_the_run_behind_a_number_is_not_looked_up(tmp_path):
    (tmp_path / "mlflow.db").touch()
    look = "from pathlib import Path; from compactgpt.tracking.mlflow_logger import run_of_value; "
    told = told_in_a_read_only_folder(tmp_path, f"{look}print(run_of_value(Path(), 'evaluation'))")
    assert told == (0, "not looked up: SQLite writes next to mlflow.db, and this folder is read-only\n")


@pytest.mark.parametrize(
    "words",
    [("experiment", "list"), ("experiment", "show", "note"), ("estimate",), ("diff", "workspace"), ("gate",)],
)
def test_outside_of_a_repository_folder_a_command_says_where_to_run(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 66
    assert "run from the repository folder" in done.output


def test_an_estimate_ends_with_the_command_that_runs_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    last = run("estimate", "-S", "training.max_steps=9").output.splitlines()[-1]
    assert last == "next: dvc exp run -S training.max_steps=9"


def test_the_version_and_short_help():
    assert run("--version").output == f"compactgpt {compactgpt.__version__}\n"
    for words in ((), ("gate",), ("experiment",), ("experiment", "run")):
        assert run(*words, "-h").output == run(*words, "--help").output != ""
        assert run(*words, "-h").exit_code == 0


def test_set_param_is_the_long_form_of_s(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (("estimate", "--json"), ("experiment", "show", "demo")):
        short, long = (run(*command, option, "training.max_steps=80") for option in ("-S", "--set-param"))
        assert short.exit_code == 0
        assert long.output == short.output
