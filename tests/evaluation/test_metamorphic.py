"""Evaluation: what must not change when the same input comes in another form; answers known beforehand."""

import math
import re

import numpy as np
import pytest
import torch

from compactgpt.common.console import silent
from compactgpt.common.errors import BadConfig
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation.baselines import load_baseline
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import evaluate
from compactgpt.evaluation.totals import figures
from compactgpt.model.huggingface import save_hf
from tests.support.tiny_corpus import write_token_file
from tests.support.tiny_models import LIKELIHOOD, TEXTS, params_of, save_split, save_tokenizer, tiny_gpt

COMPRESSOR = {"kind": "compressor", "level": 1, "train_megabytes": 0}
SPECS = {
    "compact": None,
    "unigram": {"kind": "unigram"},
    "xz": {**COMPRESSOR, "codec": "xz"},
    "zstd": {**COMPRESSOR, "codec": "zstd"},
    "zstd-primed": {**COMPRESSOR, "codec": "zstd", "train_megabytes": 1},
}


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def load(tmp_path, encoding):
    save_split(tmp_path / "train.tokens", encoding, texts=TEXTS[:3])

    def load(spec):
        params = params_of(tmp_path / "params.yaml", spec)
        return load_baseline("it", params, encoding, tmp_path / "train.tokens", tmp_path / ".state")

    return load


@pytest.mark.parametrize("name", SPECS)
def test_the_order_of_documents_the_run_and_a_second_copy_change_no_figure(tmp_path, encoding, load, name):
    model = load(SPECS[name]) if SPECS[name] else as_neural_model(tiny_gpt(encoding.n_vocab), 3)
    order = [3, 0, 4, 2, 1]
    texts = {"once": TEXTS, "shuffled": [TEXTS[index] for index in order], "twice": [*TEXTS, *TEXTS]}
    splits = {key: save_split(tmp_path / f"{key}.tokens", encoding, texts=texts[key]) for key in texts}
    once, shuffled, twice = (evaluate(model, split, encoding, LIKELIHOOD) for split in splits.values())
    assert evaluate(model, splits["once"], encoding, LIKELIHOOD).nats.tobytes() == once.nats.tobytes()
    assert shuffled.ids == [once.ids[index] for index in order]
    # A neural model sums the rows of another batch in another order; the others add whole numbers.
    np.testing.assert_allclose(shuffled.nats, once.nats[order], rtol=1e-6 if name == "compact" else 0)
    expected, found = (figures(totals.nats, totals) for totals in (once, twice))
    for figure in ("loss", "perplexity", "bits_per_byte", "word_perplexity"):
        assert found[figure]["value"] == pytest.approx(expected[figure]["value"], rel=1e-6)


def test_uniform_logits_score_the_logarithm_of_gpt2s_vocabulary_without_padding_rows(tmp_path):
    """ln(50,257), not ln(50,304)."""
    model = tiny_gpt(50_257, padded_vocab_size=50_304, n_layer=1, n_embd=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    documents = [(bytes(16), 40, np.arange(20) * 2500), (bytes(16), 9, np.array([50_255]))]
    about = {"vocab_size": 50_257, "eot_token": 50_256, "tokenizer_sha256": "0" * 64}
    write_token_file(tmp_path / "val.tokens", documents, **about)
    found = as_neural_model(model, 2).score(open_tokens(tmp_path / "val.tokens"), 8, silent)
    assert found.nats.sum() / 21 == pytest.approx(math.log(50_257), rel=1e-7)


def test_weights_copied_to_transformers_keep_every_figure(tmp_path, encoding, load):
    split = save_split(tmp_path / "val.tokens", encoding)
    ours = tiny_gpt(encoding.n_vocab)
    save_hf(ours, tmp_path / "theirs", tmp_path / "tokenizer")
    spec = {"kind": "folder", "path": str(tmp_path / "theirs")}
    with pytest.raises(BadConfig) as refused:  # the message has the hash that the spec needs
        load(spec)
    theirs = load(spec | {"sha256": re.search(r"is (\w{64})", str(refused.value))[1]})
    likelihood = LIKELIHOOD.model_copy(update={"views": ("own", "strided")})
    before = evaluate(as_neural_model(ours, 3), split, encoding, likelihood)
    copied = evaluate(theirs, split, encoding, likelihood)
    np.testing.assert_allclose(copied.nats, before.nats, rtol=1e-6)
    for view, nats in before.views.items():
        np.testing.assert_allclose(copied.views[view], nats, rtol=1e-6)
    np.testing.assert_allclose(copied.positions.nats, before.positions.nats, rtol=1e-5)


def test_a_compressor_that_has_read_the_text_needs_fewer_bits_for_it(tmp_path, encoding, load):
    save_split(tmp_path / "train.tokens", encoding)
    split = save_split(tmp_path / "val.tokens", encoding, texts=[TEXTS[3]])
    plain, primed = (
        evaluate(load(SPECS[name]), split, encoding, LIKELIHOOD).nats.sum()
        for name in ("zstd", "zstd-primed")
    )
    assert primed < plain / 4
