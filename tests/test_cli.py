"""The command: one call a command, mistakes as one sentence."""

import pytest
import torch
import transformers
from typer.testing import CliRunner

from compactgpt.checkpoint import save_model
from compactgpt.cli import app
from tests.tiny import save_tokenizer, tiny_gpt


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_an_exported_model_is_loaded_by_transformers(tmp_path):
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
    done = run(*words)
    assert done.exit_code == 78
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1
