"""The model in MLflow: logged once for each set of weights, registered when the gate promotes it."""

import shutil
from pathlib import Path

import mlflow
import pytest
import torch

import compactgpt
from compactgpt.common.errors import CheckFailed, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.data.tokenizer import load_encoding
from compactgpt.model.weights import load_model, save_model
from compactgpt.tracking.registry import MAX_NEW_TOKENS, NAME, champion, promote
from compactgpt.tracking.store import open_store
from tests.support.tiny_models import tiny_gpt
from tests.support.trained_project import register, weights

SUFFIXES = {"", ".json", ".md", ".safetensors", ".txt", ".yaml"}


def retrain(root: Path, params: str, n_embd: int) -> None:
    vocab_size = load_encoding(root / "data/tokenizer").n_vocab
    save_model(tiny_gpt(vocab_size, n_embd=n_embd), root / "models/compact")
    (root / "params.yaml").write_text(params)
    register(root)


def test_weights_are_logged_once_with_parameters_source_run_and_metrics_with_data_and_time(trained_project):
    opened = open_store(trained_project)
    tags = {"weights_sha256": weights(trained_project)}
    opened.client.create_logged_model(opened.experiment, name="compact", tags=tags)  # was cut off
    run_id, _ = register(trained_project), register(trained_project)
    found = opened.client.search_logged_models([opened.experiment])
    (model,) = [one for one in found if one.status == "READY"]
    assert model.source_run_id == run_id
    pipeline = opened.client.get_run(run_id)
    assert [one.model_id for one in pipeline.outputs.model_outputs] == [model.model_id]
    assert model.params == {"model.n_layer": "2", "training.max_steps": "9", "download.a": "1"}
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("eval/loss", 2.0, "val.tokens")
    assert metric.dataset_digest == sha256_file(trained_project / "data/tokens/val.tokens")[:36]
    assert (metric.run_id, abs(metric.timestamp - pipeline.info.end_time) < 60_000) == (run_id, True)
    assert opened.client.search_registered_models() == []


def test_a_logged_model_is_in_hugging_faces_format_and_answers_within_its_context(trained_project):
    register(trained_project)
    (model,) = open_store(trained_project).client.search_logged_models(["1"])
    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= SUFFIXES
    loaded = mlflow.pyfunc.load_model(str(folder))
    assert loaded.input_example == ["The future of AI is"]
    encoding = load_encoding(trained_project / "data/tokenizer")
    network = load_model(trained_project / "models/compact")
    tokens = encoding.encode_ordinary("the cat")
    for _ in range(network.shape.block_size // 2):
        logits = network.hidden(torch.tensor([tokens]))[0, -1] @ network.wte.weight[: encoding.n_vocab].T
        tokens.append(int(logits.argmax()))
        if tokens[-1] == encoding.eot_token:
            break
    expected = encoding.decode([one for one in tokens if one != encoding.eot_token])
    (answer, _) = loaded.predict(["the cat", "in the"], params={"do_sample": False})
    assert "the cat" + answer == expected
    (answer,) = loaded.predict(["the cat" * 500], params={"max_new_tokens": 100_000})  # a long prompt
    assert len(encoding.encode_ordinary(answer)) <= 4 * MAX_NEW_TOKENS


def test_a_champion_that_is_loaded_from_mlflow_generates_the_text_of_models_compact(trained_project):
    register(trained_project)
    promote(open_store(trained_project), weights(trained_project))
    expected = compactgpt.load("models/compact").generate("the cat", max_new_tokens=8)
    for folder in ("models", ".dvc"):  # MLflow alone has the weights
        shutil.rmtree(trained_project / folder)
    loaded = compactgpt.load(f"models:/{NAME}@champion")
    assert loaded.generate("the cat", max_new_tokens=8) == expected != ""
    with pytest.raises(MissingInput, match="has no model models:/nix@champion"):
        compactgpt.load("models:/nix@champion")


def test_only_promotion_registers_and_another_configuration_needs_a_reason(trained_project):
    run_id = register(trained_project)
    opened, first = open_store(trained_project), weights(trained_project)
    assert champion(opened) is None
    assert [promote(opened, first), promote(opened, first)] == ["1", "1"]
    found = champion(opened)
    assert (str(found.version), found.tags["pipeline_run"]) == ("1", run_id)
    with pytest.raises(MissingInput, match="no model with these weights"):
        promote(opened, "0" * 64)
    retrain(trained_project, "{model: {n_layer: 2}, training: {max_steps: 30}}", 8)
    with pytest.raises(CheckFailed, match=r"training.max_steps 9 -> 30.*--accept REASON"):
        promote(opened, weights(trained_project))
    assert str(champion(opened).version) == "1"
    assert promote(opened, weights(trained_project), "a longer run") == "2"
    assert opened.client.get_model_version(NAME, "2").tags["accepted"] == "a longer run"
    (trained_project / "data/tokens/val.tokens").write_bytes(b"another split")
    retrain(trained_project, "{model: {n_layer: 2}, training: {max_steps: 30}, download: {}}", 4)
    with pytest.raises(CheckFailed, match="val split"):
        promote(opened, weights(trained_project))
