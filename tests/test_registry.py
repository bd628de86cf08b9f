"""The model in MLflow: safetensors and code, once a set of weights; `champion` by word only."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from compactgpt.checkpoint import load_model, save_model
from compactgpt.encoding import load_encoding
from compactgpt.errors import MissingInput
from compactgpt.lineage import Cache, Folder
from compactgpt.pipelines import conclude
from compactgpt.registry import NAME, Shelf, champion, promote
from compactgpt.storage import sha256_file
from compactgpt.syncing import Syncer
from tests import store
from tests.tiny import save_tokenizer, tiny_gpt

SUFFIXES = {"", ".bpe", ".json", ".md", ".py", ".safetensors", ".txt", ".yaml"}


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    """A project with a trained model."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    (tmp_path / "dvc.yaml").write_text("stages: {training: {cmd: x}, evaluation: {cmd: x}}")
    encoding = save_tokenizer(tmp_path / "data/tokenizer")
    save_model(tiny_gpt(encoding.n_vocab), tmp_path / "models/compact", {})
    (tmp_path / "reports").mkdir()
    bounds = {"value": 2.0, "low": 1.0, "high": 3.0}
    (tmp_path / "reports/evaluation.json").write_text(json.dumps({"loss": bounds}))
    for path in ("models/compact", "data/tokenizer"):
        store.cache_out(tmp_path, path)
    outs = {"training": ["models/compact", "data/tokenizer"], "evaluation": ["reports/evaluation.json"]}
    store.save_lock(tmp_path, outs)
    return tmp_path


def register(root) -> str:
    client, experiment = Syncer(root).connect()
    run_id = client.create_run(experiment, run_name="pipeline").info.run_id
    place, cache = Folder(root), Cache(root)
    version = Shelf(client, experiment, run_id, run_id).register(
        conclude(place, cache, None, [], lambda _: ""), place, cache
    )
    client.set_tag(run_id, "model_version", version)
    return run_id


def test_a_logged_model_is_code_and_safetensors_and_answers(root):
    import mlflow

    register(root)
    client, _ = Syncer(root).connect()
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    folder = Path(mlflow.artifacts.download_artifacts(version.source))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == SUFFIXES
    assert (folder / "code/compactgpt/model.py").exists()
    assert "| Loss (nats per token) | 2.0000 |" in (folder / "README.md").read_text()
    model = mlflow.pyfunc.load_model(str(folder))
    frame = pd.DataFrame({"prompt": ["the cat", "", "in the"]})
    first = model.predict(frame, params={"max_new_tokens": 3})
    assert first.equals(model.predict(frame, params={"max_new_tokens": 3}))
    assert list(first.columns) == ["text", "loss"]
    assert first.loss[1] == 0.0
    encoding = load_encoding(root / "data/tokenizer")
    tokens = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary("the cat")]])
    gpt = load_model(root / "models/compact")
    logits = gpt.hidden(tokens[:, :-1])[0] @ gpt.wte.weight[: encoding.n_vocab].T
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
    assert first.loss[0] == pytest.approx(expected, rel=1e-5)
    assert model.metadata.signature.inputs.input_names() == ["prompt"]
    assert model.input_example.prompt[0].startswith("The future")


def test_the_same_weights_are_logged_once(root):
    register(root)
    register(root)
    client, experiment = Syncer(root).connect()
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    assert len(client.search_logged_models([experiment])) == 1
    save_model(tiny_gpt(30), root / "models/compact", {})
    store.cache_out(root, "models/compact")
    store.save_lock(root, {"training": ["models/compact", "data/tokenizer"]})
    register(root)
    assert {v.version for v in client.search_model_versions(f"name = '{NAME}'")} == {1, 2}


def test_a_registration_that_was_cut_off_goes_on(root, monkeypatch):
    client, _ = Syncer(root).connect()

    def refuse(*_args, **_kwargs):
        raise ConnectionError("the server was killed")

    with monkeypatch.context() as patched:
        patched.setattr(type(client), "create_model_version", refuse)
        with pytest.raises(ConnectionError):
            register(root)
    register(root)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    assert len(client.search_logged_models([Syncer(root).connect()[1]])) == 1


def test_only_promotion_makes_a_champion(root):
    run_id = register(root)
    client, _ = Syncer(root).connect()
    assert champion(client) is None
    weights = sha256_file(root / "models/compact/model.safetensors")
    assert promote(client, weights) == "1"
    assert champion(client) == {"version": "1", "run_id": run_id, "weights_sha256": weights}
    with pytest.raises(MissingInput, match="no model with these weights"):
        promote(client, "0" * 64)
