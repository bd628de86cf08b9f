from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def split(tmp_path, encoding):
    return save_split(tmp_path / "val.tokens", encoding)


@pytest.fixture
def model(encoding):
    return tiny_gpt(encoding.n_vocab)


@pytest.fixture
def run_stage(tmp_path, split, monkeypatch):
    """Run a stage in a project that has token files and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tokens").symlink_to(tmp_path)
    (tmp_path / "data/tokenizer").symlink_to(tmp_path / "tokenizer")
    return lambda app, *arguments: CliRunner().invoke(app, [*arguments, "--tracker", "none"])


@pytest.fixture
def run_stage_twice(run_stage):
    """Run a stage twice, and return the contents of its outputs, which must be the same."""

    def run_twice(app, *arguments, outs):
        contents = []
        for _ in range(2):
            result = run_stage(app, *arguments)
            assert result.exit_code == 0, result.output
            contents.append([Path(out).read_bytes() for out in outs])
        assert contents[0] == contents[1]
        return contents[0]

    return run_twice
