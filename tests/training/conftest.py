"""Folders with token files, and with the input of the training stage."""

from pathlib import Path

import pytest

from tests.support.tiny_training import make_tokens, write_params


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with params.yaml and tokens, not under DVC."""
    for name in ("DVC_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_params()
    make_tokens(Path("data/tokens"))
    return tmp_path
