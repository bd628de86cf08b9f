"""The model card is what the hub reads, says what the record says, and goes only with its own weights."""

import json

from huggingface_hub import ModelCard

from compactgpt.reporting.pages import read_card, render_model_card


def test_the_hubs_own_reader_finds_the_results(record):
    card = ModelCard(render_model_card(record))
    known = {item["id"]: item for item in record["evidence"]}
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    results = {result.metric_type: result for result in card.data.eval_results}
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert results[metric].metric_value == known[f"compact.{metric}"]["value"]
        assert results[metric].dataset_split == "val"
    assert known["compact.loss"]["weights_sha256"] in card.text
    assert "numpy 2.4.6 (BSD-3-Clause)" in card.text


def test_a_card_names_the_data_sets_of_the_hub(record):
    assert ModelCard(render_model_card(record)).data.datasets is None  # docstrings are no data set of the hub
    source = {**record["data"]["sources"][0], "name": "Salesforce/wikitext/train"}
    sources = [source, {**source, "name": "Salesforce/wikitext/test"}]
    data = {**record["data"], "corpus": "hub", "sources": sources}
    assert ModelCard(render_model_card({**record, "data": data})).data.datasets == ["Salesforce/wikitext"]


def test_a_card_goes_only_with_its_own_weights(record, tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "card.md"
    assert read_card(tmp_path / "model", path)[1].startswith(f"{path} is missing: run `dvc repro")
    path.write_text(render_model_card(record))
    for digit, fits in (("d", True), ("e", False)):
        files = {"files": {"model.safetensors": {"sha256": digit * 64, "bytes": 9}}}
        (tmp_path / "model/manifest.json").write_text(json.dumps(files))
        text, why_none = read_card(tmp_path / "model", path)
        assert (text == path.read_text()) is fits
        assert bool(why_none) is not fits
