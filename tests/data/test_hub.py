"""The hub's standard cache is used without a network; what is missing is downloaded; models are pushed."""

import json
import shutil
import time

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compactgpt import cli
from compactgpt.common.errors import BadConfig, BadData, Unreachable
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
def cache(tmp_path, monkeypatch):
    """An empty standard cache; tests/conftest.py sets HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model with its card, and the same model in Hugging Face form."""
    folder = tmp_path_factory.mktemp("trained")
    encoding = save_tokenizer(folder / "data/tokenizer")
    save_model(tiny_gpt(encoding.n_vocab), folder / "models/compact")
    manifest = json.loads((folder / "models/compact/manifest.json").read_text())
    digest = manifest["files"]["model.safetensors"]["sha256"]
    card = f"---\nlanguage: en\n---\n# A model\n\nSHA-256 of the weights as trained: `{digest}`.\n"
    (folder / "reports").mkdir()
    (folder / "reports/model_card.md").write_text(card)
    save_hf(tiny_gpt(encoding.n_vocab), folder / "exported", folder / "data/tokenizer")
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


def test_a_cache_that_other_programs_filled_is_used_offline(cache, trained):
    """It has no listing of the repository."""
    snapshot = cache / f"models--some--model/snapshots/{REVISION}"
    shutil.copytree(trained / "exported", snapshot)
    assert AutoModelForCausalLM.from_pretrained("some/model", revision=REVISION).config.n_embd
    assert hub.fetch_model("some/model", REVISION, "advice") == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(Unreachable, match=r"the hub can't be reached for some/model .*, or advice"):
        hub.fetch_model("some/model", REVISION, "advice")
    path = cache / f"datasets--some--set/snapshots/{REVISION}/data/a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert hub.fetch_file("some/set", "data/a.jsonl", REVISION, "advice").samefile(path)
    with pytest.raises(Unreachable, match=r"can't be reached for some/set"):
        hub.fetch_file("some/set", "data/b.jsonl", REVISION, "advice")


def test_a_model_is_downloaded_into_the_standard_cache_once_and_checked(cache, server):
    folder = hub.fetch_model("some/model", REVISION, "advice")
    assert folder == cache / f"models--some--model/snapshots/{REVISION}"
    assert {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}
    server.asked.clear()
    assert hub.fetch_model("some/model", REVISION, "advice") == folder
    assert server.asked == []
    blob = (folder / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BadData, match=r"model\.safetensors was altered or damaged: delete"):
        hub.fetch_model("some/model", REVISION, "advice")
    with pytest.raises(BadConfig, match=r"the hub does not have other/model at a+: advice"):
        hub.fetch_model("other/model", REVISION, "advice")


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
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.chdir(trained)
    done = push()
    assert (done.exit_code, "hf auth login" in done.output) == (Unreachable.exit_code, True), done.output
    server.close()
    start = time.monotonic()
    done = push()
    assert (done.exit_code, "can't be reached" in done.output) == (Unreachable.exit_code, True), done.output
    assert time.monotonic() - start < 10
    with pytest.raises(BadConfig, match="is not a repository name"):
        hub.push_folder(trained / "models/compact", "a b", private=False)
