"""The hub's standard cache is used without a network; what is missing is downloaded; models are pushed."""

import shutil
import time

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compactgpt import cli
from compactgpt.common.errors import BadConfig, BadData, Unreachable
from compactgpt.common.storage import sha256_file, write_text
from compactgpt.data import hub
from compactgpt.model.huggingface import save_hf
from compactgpt.model.weights import save_model
from tests.support.fake_hub import REVISION, FakeHub
from tests.support.tiny_models import save_tokenizer, tiny_gpt

FILES = {
    *("config.json", "generation_config.json", "merges.txt"),
    *("model.safetensors", "tokenizer_config.json", "vocab.json"),
}


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """The folder of a model in an empty standard cache; tests/conftest.py sets HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/models--some--model/snapshots"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model with its card, and the same model in Hugging Face form."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_gpt(save_tokenizer(folder / "data/tokenizer").n_vocab)
    save_model(model, folder / "models/compact")
    digest = sha256_file(folder / "models/compact/model.safetensors")
    card = f"---\nlanguage: en\n---\n# A model\n\nSHA-256 of the weights as trained: `{digest}`.\n"
    write_text(folder / "reports/model_card.md", card)
    save_hf(model, folder / "exported", folder / "data/tokenizer")
    return folder


@pytest.fixture
def server(trained, monkeypatch):
    """A hub with the exported model, where huggingface_hub looks for it."""
    server = FakeHub({path.name: path.read_bytes() for path in (trained / "exported").iterdir()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.close()


def fetch(repo="some/model"):
    return hub.fetch_model(repo, REVISION, "advice")


def test_a_cache_that_other_programs_filled_is_used_offline(snapshots, trained):
    """It has no listing of the repository."""
    shutil.copytree(trained / "exported", snapshots / REVISION)
    assert AutoModelForCausalLM.from_pretrained("some/model", revision=REVISION).config.n_embd
    assert fetch() == snapshots / REVISION
    (snapshots / REVISION / "model.safetensors").unlink()
    with pytest.raises(Unreachable, match=r"the hub can't be reached for some/model .*, or advice"):
        fetch()
    path = snapshots.parents[1] / f"datasets--some--set/snapshots/{REVISION}/data/a.jsonl"
    write_text(path, "{}")
    assert hub.fetch_file("some/set", "data/a.jsonl", REVISION, "advice").samefile(path)
    with pytest.raises(Unreachable, match=r"can't be reached for some/set"):
        hub.fetch_file("some/set", "data/b.jsonl", REVISION, "advice")


def test_a_model_is_downloaded_into_the_standard_cache_once_and_checked(snapshots, server):
    assert fetch() == snapshots / REVISION
    assert {path.name for path in fetch().iterdir()} == FILES | {"manifest.json"}
    server.asked.clear()
    blob = (fetch() / "model.safetensors").resolve()
    assert server.asked == []
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(BadData, match=r"model\.safetensors was altered or damaged: delete"):
        fetch()
    with pytest.raises(BadConfig, match=r"the hub does not have other/model at a+: advice"):
        fetch("other/model")


def push(*words):
    return CliRunner().invoke(cli.app, ["push-to-hub", "some/model", *words])


def test_a_model_is_pushed_as_the_hub_takes_it(trained, server, monkeypatch):
    monkeypatch.chdir(trained)
    done = push("--dry-run")
    assert {line.split()[1] for line in done.output.splitlines()[:-1]} == FILES | {"README.md"}
    assert "nothing was uploaded" in done.output
    assert server.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = push()
    assert done.exit_code == 0, done.output
    assert f"{server.url}/some/model/commit/{REVISION}" in done.output
    assert set(server.uploaded) == FILES | {"README.md"}
    assert server.uploaded["README.md"].decode() == (trained / "reports/model_card.md").read_text()


def test_a_push_that_cannot_work_is_one_message(trained, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.chdir(trained)
    done = push()
    assert (done.exit_code, "hf auth login" in done.output) == (Unreachable.exit_code, True), done.output
    server.close()
    start = time.monotonic()
    assert push().exit_code == Unreachable.exit_code
    assert time.monotonic() - start < 10
    with pytest.raises(BadConfig, match="is not a repository name"):
        hub.push_folder(trained / "models/compact", "a b", private=False)
