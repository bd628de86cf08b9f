"""Every token is scored once, whatever the batch; figures equal a plain computation."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from torch.nn import functional as F

from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotFinite
from compactgpt.common.storage import json_bytes, sha256_file
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation import likelihood
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.likelihood import DocumentModel, evaluate, target_nats
from compactgpt.evaluation.metrics import ratio_interval
from compactgpt.evaluation.totals import Totals, read_totals, write_totals
from compactgpt.model.weights import save_model
from tests.evaluation.plain_model import plain_nats
from tests.support.tiny_models import LIKELIHOOD, TEXTS, save_params, save_split


def nats_by_document(model, split, window):
    """Return the losses of the documents, computed one window at a time."""
    nats = np.zeros(split.header.documents)
    for document in range(split.header.documents):
        stream = [split.header.eot_token, *split.document(document).tolist()]
        for start, end in pairwise([*range(0, len(stream) - 1, window), len(stream) - 1]):
            nats[document] += plain_nats(model, stream[start:end], stream[start + 1 : end + 1])
    return nats


@pytest.mark.parametrize("settings", [{}, {"SORTED_WINDOWS": 2}, {"CPU_TOKENS": 1}, {"HEAD_ROWS": 5}])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_nats_equal_a_plain_computation_in_any_batches(
    encoding, split, model, monkeypatch, batch_size, settings
):
    for name, value in settings.items():
        monkeypatch.setattr(likelihood, name, value)
    found = evaluate(as_neural_model(model, batch_size), split, encoding, LIKELIHOOD)
    np.testing.assert_allclose(found.nats, nats_by_document(model, split, 8), rtol=1e-6)
    assert found.tokens.tolist() == found.own_tokens.tolist()
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]


def test_only_the_first_tokens_of_each_document_are_scored(encoding, split, model):
    """The second document begins "é 漢字": its tokens 1 and 2 are one character, and 4 to 6 are another."""
    settings = LIKELIHOOD.model_copy(update={"document_tokens": 5})
    part = likelihood.scored_split(split, encoding, settings)
    assert np.diff(part.offsets).tolist() == [6, 4, 2, 6, 3]  # with end-of-text
    texts = [likelihood.document_text(part, encoding, index).decode() for index in range(5)]
    assert texts == ["the cat", "é ", "a", "Retur", "then"]
    found = evaluate(as_neural_model(model, 3), part, encoding, settings)
    np.testing.assert_allclose(found.nats, nats_by_document(model, part, 8), rtol=1e-6)


def test_memory_is_bounded_in_windows_and_in_logits(split, model, monkeypatch):
    monkeypatch.setattr(likelihood, "HEAD_ROWS", 5)
    monkeypatch.setattr(likelihood, "SORTED_WINDOWS", 4)
    windows, drawn, rows = list(likelihood.evaluation_windows(split, 8)), [], []

    def score(logits, targets):
        rows.append(len(logits))
        return F.cross_entropy(logits, targets, reduction="none")

    lazy = (drawn.append(window) or window for window in windows)
    for count, _ in enumerate(likelihood.score_targets(as_neural_model(model, 2), lazy, score)):
        assert len(drawn) == min(len(windows), 4 * (count // 4 + 1))
    assert (max(rows), sum(rows)) == (5, sum(len(window.targets) for window in windows))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 20))
def test_every_target_is_scored_once_in_every_view_with_the_promised_context(lengths, context, stride):
    """Each token is its own position, so that a window shows what it was cut from."""
    stride = min(stride, context)
    streams = [(document, np.arange(length + 1)) for document, length in enumerate(lengths)]
    views = {
        "own": (likelihood.cut_windows(streams, context), 1),
        "strided": (likelihood.strided_windows(streams, context, stride), context - stride + 1),
    }
    for windows, least_context in views.values():
        scored = [[] for _ in lengths]
        for one in windows:
            assert len(one.tokens) <= context
            assert one.tokens.tolist() == list(range(one.targets[-1] - len(one.tokens), one.targets[-1]))
            scored[one.document] += one.targets.tolist()
            known = one.targets - one.tokens[0]  # tokens before each target
            assert (known >= np.minimum(one.targets, least_context)).all()
        assert scored == [list(range(1, length + 1)) for length in lengths]


@pytest.mark.parametrize(("own_context", "context"), [(5, 5), (8, 8), (64, 16)])
def test_views_have_the_models_context_or_the_configured_one(encoding, split, model, own_context, context):
    """The windows of the view `own` with a context of 8 are those of every model, which are scored once."""
    settings = LIKELIHOOD.model_copy(update={"own_context": own_context, "views": ("own", "strided")})
    neural = as_neural_model(model, 3)
    found = evaluate(neural, split, encoding, settings)
    assert (found.views["own"] is found.nats) == (context == 8)
    np.testing.assert_allclose(found.views["own"], nats_by_document(model, split, context), rtol=1e-6)
    report = likelihood.summarize("m", neural, found, split, settings)
    sizes = {name: (view["context"], view["stride"]) for name, view in report["views"].items()}
    assert sizes == {"own": (context, context), "strided": (context, max(1, round(context / 4)))}
    for name, view in report["views"].items():
        assert view["loss"]["value"] == pytest.approx(found.views[name].sum() / found.tokens.sum())


def test_loss_by_position_adds_up_and_is_where_it_was_scored(encoding, split, model):
    neural = as_neural_model(model, 3)
    found = evaluate(neural, split, encoding, LIKELIHOOD)
    rows = likelihood.summarize("m", neural, found, split, LIKELIHOOD)["by_position"]
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 2), (3, 4), (5, 8)]  # 9 to 16: none
    windows = list(target_nats(neural, likelihood.evaluation_windows(split, 8)))
    for row in rows:
        values = np.concatenate([nats[row["first"] - 1 : row["last"]] for _, nats in windows])
        assert row["tokens"] == len(values)
        assert row["loss"]["value"] == pytest.approx(values.mean(), rel=1e-6)


def fixed(nats=()):
    """Return a model that gives fixed nats, and has no tokens."""
    facts = {"kind": "fixed", "num_params": None}
    return DocumentModel(facts, lambda _split, document: nats[document], reads_tokens=False)


def test_broken_weights_windows_and_splits_are_refused(tmp_path, encoding, split, model):
    long = LIKELIHOOD.model_copy(update={"window": 17})
    with pytest.raises(BadConfig, match="a window of 17 tokens does not fit the model's context of 16"):
        evaluate(as_neural_model(model, 4), split, encoding, long)
    for bad in (math.nan, math.inf):
        message = f"document {split.document_ids[2]} of {split.path} got {bad} nats: the model's weights"
        with pytest.raises(NotFinite, match=re.escape(message)):
            evaluate(fixed([1.0, 2.0, bad, math.nan, 3.0]), split, encoding, LIKELIHOOD)
    empty = save_split(tmp_path / "empty.tokens", encoding, texts=["", ""])
    with pytest.raises(BadData, match="has no token to score: add text"):
        evaluate(fixed(), empty, encoding, LIKELIHOOD)
    split.byte_lengths[1] += 1
    with pytest.raises(BadData, match="dvc repro -f download tokenization"):
        evaluate(fixed(), split, encoding, LIKELIHOOD)


def test_the_report_divides_sums_worked_by_hand(split):
    """Two documents and an empty one: 30 nats over 12 tokens, 40 bytes, 10 own tokens, 6 words."""
    nats = np.array([18.0, 12.0, 0.0])
    counts = [np.array(column) for column in ([10, 30, 0], [4, 8, 0], [4, 6, 0])]
    totals = Totals(["aa", "bb", "cc"], *counts, nats, np.array([2, 4, 0]))
    report = likelihood.summarize("x", fixed(), totals, split, LIKELIHOOD)
    assert report["model"] == {"name": "x", "kind": "fixed", "num_params": None}
    sizes = {"documents": 3, "tokens": 12, "bytes": 40, "words": 6}
    assert report["validation"] == {"sha256": sha256_file(split.path), **sizes}
    assert report["loss"]["value"] == pytest.approx(2.5)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(2.5))
    assert report["word_perplexity"]["value"] == pytest.approx(math.exp(5))
    assert report["bits_per_byte"]["value"] == pytest.approx(30 / 40 / math.log(2))
    assert (report["own_tokens"], report["loss_per_own_token"]) == (10, pytest.approx(3.0))
    expected = ratio_interval(nats[:2], np.array([10.0, 30.0]))
    assert expected.low < 0 == report["bits_per_byte"]["low"]  # a loss is never negative
    assert report["bits_per_byte"]["high"] == pytest.approx(expected.high / math.log(2))
    assert report["perplexity"]["high"] == pytest.approx(math.exp(report["loss"]["high"]))
    uncounted = replace(totals, own_tokens=None, words=None)
    report = likelihood.summarize("x", fixed(), uncounted, split, LIKELIHOOD)
    assert report["own_tokens"] is report["loss_per_own_token"] is report["word_perplexity"] is None


def test_a_diverged_model_and_text_without_spaces_have_reports_of_valid_json(tmp_path, encoding, model):
    """A loss of 3,075,166 is from a real run; a word of 300 characters has more than 709 nats."""
    split = save_split(tmp_path / "x.tokens", encoding, texts=["漢字" * 150, "漢" * 300])
    found = evaluate(as_neural_model(model, 3), split, encoding, LIKELIHOOD)
    report = likelihood.summarize("x", fixed(), found, split, LIKELIHOOD)
    assert report["word_perplexity"] is None
    assert report["perplexity"]["value"] > 1
    diverged = replace(found, nats=found.tokens * 3_075_166.0, views={})
    report = likelihood.summarize("x", fixed(), diverged, split, LIKELIHOOD) | {"tasks": {}}
    assert (report["loss"]["value"], report["perplexity"]) == (pytest.approx(3_075_166), None)
    assert set(likelihood.headline(report)) == {"loss", "bits_per_byte"}
    json_bytes(report)  # refuses infinity


SUMS = {
    "id": ["aa", "bb"], "bytes": [10, 30], "tokens": [4, 8], "own_tokens": [4, 6], "words": [2, 5],
    "nats": [1.25, 0.5], "nats_strided": [1.0, 0.25],
}  # fmt: skip


def test_sums_are_read_back(tmp_path):
    arrays = {name: np.array(SUMS[name]) for name in ("bytes", "tokens", "nats")}
    views = {"strided": np.array(SUMS["nats_strided"])}
    write_totals(tmp_path / "x", Totals(SUMS["id"], **arrays, own_tokens=None, words=None, views=views))
    found = read_totals(tmp_path / "x")
    for name, values in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), values)
    assert found.own_tokens is found.words is None
    assert (found.ids, found.views["strided"].tolist()) == (SUMS["id"], SUMS["nats_strided"])


def test_damaged_and_missing_sums_are_refused_and_earlier_ones_read(tmp_path):
    path = tmp_path / "x.parquet"
    with pytest.raises(
        MissingInput, match=r"x\.parquet is missing: run `dvc repro` in the repository folder$"
    ):
        read_totals(path)
    damaged = f"^{re.escape(str(path))} is damaged: delete it and run `dvc repro`$"
    for name in ("id", "nats"):
        parquet.write_table(pyarrow.table(SUMS).drop_columns(name), path)
        with pytest.raises(BadData, match=damaged):
            read_totals(path)
    path.write_bytes(b"PAR1 not")
    with pytest.raises(BadData, match=damaged):
        read_totals(path)
    parquet.write_table(pyarrow.table(SUMS).drop_columns("words"), path)
    assert read_totals(path).words is None


def test_the_stage_writes_the_same_bytes_twice(tmp_path, split, model, run_stage, run_stage_twice):
    from stages.evaluation import app

    save_params(tmp_path / "params.yaml", lambda tree: None)
    missing = run_stage(app)
    assert (missing.exit_code, missing.output.count("\n")) == (MissingInput.exit_code, 1)
    save_model(model, tmp_path / "models/compact")
    outs = [f"reports/{name}" for name in ("evaluation.json", "metrics.json", "samples.json", "samples.md")]
    contents = run_stage_twice(app, outs=[*outs, "data/evaluation/compact.parquet"])
    report, metrics, samples = (json.loads(content) for content in contents[:3])
    expected = nats_by_document(model, open_tokens(split.path), 8).sum() / report["validation"]["tokens"]
    assert report["loss"]["value"] == pytest.approx(expected, rel=1e-6)
    assert report["views"]["own"]["context"] == 16
    assert metrics == {name: report[name]["value"] for name in ("loss", "perplexity", "bits_per_byte")}
    assert report["tasks"] == {}  # no word of four letters comes twice in the tiny texts
    assert set(report["text"]["statistics"]) == {"greedy", "top_k", "nucleus", "human"}
    assert len(samples["samples"]) == 6
    report["tasks"] = {"cloze": {"accuracy": {"value": 0.25}}}
    assert likelihood.headline(report) == {**metrics, "cloze_accuracy": 0.25}
