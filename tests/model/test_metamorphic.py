"""Silent wrongness: what must not change when the input is said in another way; answers known beforehand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from compactgpt import config
from compactgpt.common.console import silent
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation.baselines import BaselineInputs, load_baseline
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import evaluate, figures
from compactgpt.model.huggingface import load_hf, save_hf
from tests.support.tiny_corpus import write_token_file
from tests.support.tiny_models import LIKELIHOOD, TEXTS, save_split, save_tokenizer, tiny_gpt

COMPRESSOR = {"kind": "compressor", "level": 9, "train_megabytes": 0}
SPECS = {
    "unigram": {"kind": "unigram"},
    "xz": {**COMPRESSOR, "codec": "xz", "level": 1},
    "zstd": {**COMPRESSOR, "codec": "zstd"},
    "zstd-primed": {**COMPRESSOR, "codec": "zstd", "train_megabytes": 1},
}
MODELS = ["compact", *SPECS]
EXACT = {"compact": 1e-6}  # rows of another batch are summed in another order; the others add whole numbers


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def around(tmp_path, encoding):
    save_split(tmp_path / "train.tokens", encoding, texts=TEXTS[:3])
    runtime = config.Runtime(device="cpu", num_threads=1, num_workers=1)
    return BaselineInputs(tmp_path / "train.tokens", encoding, 3, runtime, tmp_path / ".state")


def load(around, spec):
    names = {"names": ["it"], "specs": {"it": spec}}
    return load_baseline("it", config.Baseline.model_validate_json(json.dumps(names)), around)


def model_of(name, around):
    if name == "compact":
        return as_neural_model(tiny_gpt(around.encoding.n_vocab), 3)
    return load(around, SPECS[name])


@pytest.mark.parametrize("name", MODELS)
def test_shuffled_documents_leave_every_sum(tmp_path, around, name):
    model, order = model_of(name, around), [3, 0, 4, 2, 1]
    plain = save_split(tmp_path / "val.tokens", around.encoding)
    mixed = save_split(tmp_path / "mixed.tokens", around.encoding, texts=[TEXTS[place] for place in order])
    before, after = (evaluate(model, split, around.encoding, LIKELIHOOD) for split in (plain, mixed))
    assert after.ids == [before.ids[place] for place in order]
    for column in ("bytes", "tokens", "words"):
        assert getattr(after, column).sum() == getattr(before, column).sum()
    np.testing.assert_allclose(after.nats, before.nats[order], rtol=EXACT.get(name, 0))


@pytest.mark.parametrize("name", MODELS)
def test_a_doubled_corpus_has_the_same_bits_per_byte(tmp_path, around, name):
    model = model_of(name, around)
    found = []
    for label, texts in (("once", TEXTS), ("twice", [*TEXTS, *TEXTS])):
        split = save_split(tmp_path / f"{label}.tokens", around.encoding, texts=texts)
        totals = evaluate(model, split, around.encoding, LIKELIHOOD)
        found.append(figures(totals.nats, totals, LIKELIHOOD))
    once, twice = found
    for figure in ("loss", "perplexity", "bits_per_byte", "word_perplexity"):
        assert twice[figure]["value"] == pytest.approx(once[figure]["value"], rel=1e-6)
    if once["loss"]["high"] > once["loss"]["low"]:  # more documents are known better
        width = [each["loss"]["high"] - each["loss"]["low"] for each in found]
        assert width[1] < width[0]


@pytest.mark.parametrize("name", MODELS)
def test_evaluating_twice_is_identical(tmp_path, around, name):
    split = save_split(tmp_path / "val.tokens", around.encoding)
    model = model_of(name, around)
    first, again, anew = (
        evaluate(each, split, around.encoding, LIKELIHOOD).nats.tobytes()
        for each in (model, model, model_of(name, around))
    )
    assert first == again == anew


def test_a_model_that_is_the_truth_scores_zero(tmp_path, around):
    """Every token follows from the one before it, and the model knows which."""
    alphabet = "abcdefghij"
    split = save_split(tmp_path / "val.tokens", around.encoding, texts=[alphabet, alphabet[:4]])
    stream = [split.header.eot_token, *split.document(0).tolist()]
    assert len(stream) == len(set(stream)) == len(alphabet) + 1
    V = split.header.vocab_size
    follows = torch.zeros(V, V)
    follows[stream[:-1], stream[1:]] = 1000.0
    knowing = replace(model_of("compact", around), hidden=lambda tokens: follows[tokens], head=torch.eye(V))
    totals = evaluate(knowing, split, around.encoding, LIKELIHOOD)
    found = figures(totals.nats, totals, LIKELIHOOD)
    assert totals.nats.tolist() == [0, 0]
    assert found["loss"] == {"value": 0, "low": 0, "high": 0}
    assert found["bits_per_byte"]["value"] == 0
    assert found["perplexity"]["value"] == 1


def test_uniform_logits_score_the_logarithm_of_gpt2s_vocabulary(tmp_path):
    """ln(50,257), not ln(50,304): rows that pad the vocabulary have no share."""
    model = tiny_gpt(50_257, padded_vocab_size=50_304, n_layer=1, n_embd=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    documents = [(bytes(16), 40, np.arange(20) * 2500), (bytes(16), 9, np.array([50_255]))]
    write_token_file(
        tmp_path / "val.tokens", documents, vocab_size=50_257, eot_token=50_256, tokenizer_sha256="0" * 64
    )
    found = as_neural_model(model, 2).score(open_tokens(tmp_path / "val.tokens"), 8, silent)
    assert found.nats.sum() / 21 == pytest.approx(math.log(50_257), rel=1e-7)


def test_weights_that_are_copied_to_transformers_and_back_leave_every_number(tmp_path, around):
    split = save_split(tmp_path / "val.tokens", around.encoding)
    ours = tiny_gpt(around.encoding.n_vocab)
    save_hf(ours, tmp_path / "theirs", tmp_path / "tokenizer")
    theirs = load(around, {"kind": "folder", "path": str(tmp_path / "theirs")})
    back = load_hf(tmp_path / "theirs")
    before, copied, again = (
        evaluate(model, split, around.encoding, LIKELIHOOD, views=["own", "strided"])
        for model in (as_neural_model(ours, 3), theirs, as_neural_model(back, 3))
    )
    assert again.nats.tobytes() == before.nats.tobytes()
    assert copied.own_tokens.tolist() == before.own_tokens.tolist()
    np.testing.assert_allclose(copied.nats, before.nats, rtol=1e-6)
    for view, nats in before.views.items():
        np.testing.assert_allclose(copied.views[view], nats, rtol=1e-6)
    np.testing.assert_allclose(copied.positions.nats, before.positions.nats, rtol=1e-5)


def test_the_order_of_what_was_counted_is_nothing_to_the_unigram(tmp_path, around):
    split = save_split(tmp_path / "val.tokens", around.encoding)
    before = load(around, SPECS["unigram"]).score(split, 8, silent).nats
    save_split(around.train, around.encoding, texts=TEXTS[:3][::-1])
    np.testing.assert_array_equal(load(around, SPECS["unigram"]).score(split, 8, silent).nats, before)


def test_a_compressor_that_has_read_the_text_pays_less_for_it(tmp_path, around):
    save_split(around.train, around.encoding)
    split = save_split(tmp_path / "val.tokens", around.encoding, texts=[TEXTS[3]])
    plain, primed = (
        evaluate(load(around, SPECS[name]), split, around.encoding, LIKELIHOOD).nats.sum()
        for name in ("zstd", "zstd-primed")
    )
    assert primed < plain / 4
