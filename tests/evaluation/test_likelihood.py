"""Evaluation: every token once, whatever the batch; figures that a plain computation gives as well."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from torch.nn import functional as F
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotFinite
from compactgpt.common.storage import read_json, sha256_file
from compactgpt.data.token_files import Window, open_tokens
from compactgpt.evaluation import likelihood
from compactgpt.evaluation.compact import compact
from compactgpt.evaluation.likelihood import Nats, Positions, Totals, evaluate, target_nats
from compactgpt.evaluation.metrics import ratio_bootstrap
from compactgpt.model.weights import save_model
from tests.support.tiny_corpus import write_token_file
from tests.support.tiny_models import LIKELIHOOD, TEXTS, save_params, save_split, save_tokenizer, tiny_gpt


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def split(tmp_path, encoding):
    return save_split(tmp_path / "val.tokens", encoding)


@pytest.fixture
def model(encoding):
    return tiny_gpt(encoding.n_vocab)


def plain_nats(model, split, window):
    """Independent reference: one window at a time, all logits in float64, log-softmax by hand."""
    model = model.double().eval()
    nats = []
    for document in range(split.header.documents):
        stream = [split.header.eot_token, *split.document(document).tolist()]
        total = 0.0
        for start in range(0, len(stream) - 1, window):
            fed, targets = stream[start : start + window], stream[start + 1 : start + window + 1]
            with torch.no_grad():
                logits = model.hidden(torch.tensor([fed]))[0] @ model.wte.weight.T
            logits = logits[:, : model.shape.vocab_size]
            for row, target in zip(logits, targets, strict=False):
                total += math.log(sum(math.exp(x) for x in row.tolist())) - row[target].item()
        nats.append(total)
    model.float()
    return np.array(nats)


@pytest.mark.parametrize("window", [1, 3, 8, 16])
def test_every_token_is_a_target_once_and_sees_only_its_window(split, model, window):
    found = list(target_nats(compact(model, 4), likelihood.evaluation_windows(split, window)))
    for document in range(split.header.documents):
        mine = sorted((w for w, _ in found if w.document == document), key=lambda w: w.start)
        tokens = split.document(document)
        assert np.concatenate([w.targets for w in mine]).tolist() == tokens.tolist()
        for one in mine:
            before = split.header.eot_token if one.start == 0 else tokens[one.start - 1]
            assert one.tokens.tolist() == [before, *one.targets[:-1].tolist()]
            assert len(one.targets) <= window
    assert all(len(values) == len(one.targets) for one, values in found)


def test_nats_equal_a_plain_computation_from_all_logits(encoding, split, model):
    found = evaluate(compact(model, 3), split, encoding, LIKELIHOOD)
    np.testing.assert_allclose(found.nats, plain_nats(model, split, 8), rtol=1e-6)
    assert found.tokens.tolist() == found.own_tokens.tolist()
    assert found.tokens.dtype == found.own_tokens.dtype == np.int64
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 20))
def test_every_target_is_scored_once_in_every_view_with_the_context_promised(lengths, context, stride):
    """Tokens are their own places, so that a window tells what it was cut from."""
    stride = min(stride, context)
    streams = [(document, np.arange(length + 1)) for document, length in enumerate(lengths)]
    views = {
        "own": (likelihood.own_windows(streams, context), 1),
        "strided": (likelihood.strided_windows(streams, context, stride), context - stride + 1),
    }
    for windows, least_context in views.values():
        scored = [[] for _ in lengths]
        for one in windows:
            assert len(one.targets)
            assert one.targets[0] == one.start + 1
            assert len(one.tokens) <= context
            assert one.tokens.tolist() == list(range(one.targets[-1] - len(one.tokens), one.targets[-1]))
            scored[one.document] += one.targets.tolist()
            known = one.targets - one.tokens[0]  # tokens before each target
            assert (known >= np.minimum(one.targets, least_context)).all()
        assert scored == [list(range(1, length + 1)) for length in lengths]


def test_the_own_view_is_the_matched_one_where_contexts_are_equal(split):
    def plain(windows):
        return [(w.document, w.start, w.tokens.tolist(), w.targets.tolist()) for w in windows]

    streams = likelihood.document_streams(split)
    assert plain(likelihood.own_windows(streams, 8)) == plain(likelihood.evaluation_windows(split, 8))


def test_the_strided_view_equals_one_window_for_each_token(encoding, split, model):
    """The independent reference: context 16, stride 1, every token scored by itself."""
    likelihood = LIKELIHOOD.model_copy(update={"stride_share": 1 / 16})
    found = evaluate(compact(model, 5), split, encoding, likelihood, views=["strided", "own"])
    model = model.double().eval()
    for document in range(len(TEXTS)):
        stream, total = [split.header.eot_token, *split.document(document).tolist()], 0.0
        for place in range(1, len(stream)):
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([stream[max(0, place - 16) : place]]))[0, -1]
            logits = model.wte.weight[: model.shape.vocab_size] @ hidden
            total += F.cross_entropy(logits, torch.tensor(stream[place])).item()
        assert found.views["strided"][document] == pytest.approx(total, rel=1e-6)
    assert found.views["strided"][3] != pytest.approx(found.views["own"][3], rel=1e-4)


@pytest.mark.parametrize(("own_context", "context"), [(5, 5), (16, 16), (64, 16)])
def test_the_own_view_has_the_models_context_or_the_one_that_is_asked_for(
    encoding, split, model, own_context, context
):
    likelihood = LIKELIHOOD.model_copy(update={"own_context": own_context})
    found = evaluate(compact(model, 3), split, encoding, likelihood, views=["own", "strided"])
    np.testing.assert_allclose(found.views["own"], plain_nats(model, split, context), rtol=1e-6)
    report = likelihood.summarize("m", compact(model, 3), found, split, likelihood)
    assert list(report["views"]) == ["own", "strided"]
    sizes = {name: (view["context"], view["stride"]) for name, view in report["views"].items()}
    assert sizes == {"own": (context, context), "strided": (context, max(1, round(context / 4)))}
    for name, view in report["views"].items():
        assert view["loss"]["value"] == pytest.approx(found.views[name].sum() / found.tokens.sum())
    assert report["window"] == 8


def test_loss_by_position_adds_up_and_is_where_it_was_scored(encoding, split, model):
    found = evaluate(compact(model, 3), split, encoding, LIKELIHOOD)
    np.testing.assert_allclose(found.positions.nats.sum(1), found.nats)
    assert found.positions.nats.shape == (5, 5)  # a context of 16: 1, 2, 3 to 4, 5 to 8, 9 to 16
    rows = summary(compact(model, 3), split, encoding)["by_position"]
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    windows = list(target_nats(compact(model, 1), likelihood.evaluation_windows(split, 8)))
    for row in rows:
        values = np.concatenate([nats[row["first"] - 1 : row["last"]] for _, nats in windows])
        assert row["tokens"] == len(values)
        assert row["loss"]["value"] == pytest.approx(values.mean(), rel=1e-6)


def test_places_that_no_window_reaches_have_no_row():
    tokens = np.array([[1, 0, 2, 0], [1, 0, 0, 0]])
    nats = np.array([[3.0, 0.0, 8.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    first, third = likelihood.by_position(Positions(nats, tokens), LIKELIHOOD)
    assert (first["first"], first["last"], first["tokens"], first["loss"]["value"]) == (1, 1, 2, 4.0)
    assert third == {
        "first": 3, "last": 4, "tokens": 2, "loss": {"value": 4.0, "low": 4.0, "high": 4.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (1023, 10), (1024, 11)]
)
def test_a_places_bucket_is_the_next_power_of_two(place, bucket):
    assert likelihood.position_buckets(place, place + 1).tolist() == [bucket]
    assert likelihood.position_buckets(0, place + 1).tolist()[-1] == bucket


def test_the_headline_is_a_few_figures_of_the_report():
    figure = {"value": 2.0, "low": 1.5, "high": 2.5}
    report = {
        "loss": figure, "perplexity": {"value": 7.4}, "bits_per_byte": {"value": 0.8}, "window": 8,
        "tasks": {"cloze": {"accuracy": {"value": 0.25, "low": 0.1}, "items": 8}},
        "text": {"statistics": {"greedy": {"seq_rep_4": {"value": 0.5}, "x": 1}, "human": {}}},
    }  # fmt: skip
    plain = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 0.8}
    assert likelihood.headline(report) == {**plain, "cloze_accuracy": 0.25}
    for tasks, statistics in (({}, {}), ({"cloze": {}}, {"greedy": {}})):
        few = {**report, "tasks": tasks, "text": {"statistics": statistics}}
        assert likelihood.headline(few) == plain


def test_words_are_what_white_space_parts(encoding, split, model):
    found = evaluate(compact(model, 3), split, encoding, LIKELIHOOD)
    assert found.words.tolist() == [len(text.split()) for text in TEXTS]
    report = summary(compact(model, 3), split, encoding)
    assert report["validation"]["words"] == found.words.sum()
    assert report["word_perplexity"]["value"] == pytest.approx(math.exp(found.nats.sum() / found.words.sum()))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(encoding, split, model, num_threads):
    expected, before = plain_nats(model, split, 8), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = evaluate(compact(model, 3), split, encoding, LIKELIHOOD).nats
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_results_do_not_depend_on_the_batch_size(encoding, split, model, batch_size):
    expected = evaluate(compact(model, 3), split, encoding, LIKELIHOOD).nats
    np.testing.assert_allclose(
        evaluate(compact(model, batch_size), split, encoding, LIKELIHOOD).nats, expected, rtol=1e-6
    )


def test_results_do_not_depend_on_how_many_windows_are_sorted_together(encoding, split, model, monkeypatch):
    expected = evaluate(compact(model, 3), split, encoding, LIKELIHOOD).nats
    monkeypatch.setattr(likelihood, "SORTED_WINDOWS", 2)
    np.testing.assert_allclose(
        evaluate(compact(model, 3), split, encoding, LIKELIHOOD).nats, expected, rtol=1e-6
    )


def test_results_do_not_depend_on_how_many_tokens_the_trunk_takes_at_once(
    encoding, split, model, monkeypatch
):
    expected = evaluate(compact(model, 9), split, encoding, LIKELIHOOD).nats
    monkeypatch.setattr(likelihood, "CPU_TOKENS", 1)
    np.testing.assert_allclose(
        evaluate(compact(model, 9), split, encoding, LIKELIHOOD).nats, expected, rtol=1e-6
    )


@pytest.mark.parametrize(("tokens_at_once", "least"), [(1, 1), (24, 3), (10_000, 4)])
def test_long_windows_go_first_and_few_enough_together(split, model, monkeypatch, tokens_at_once, least):
    """At most four windows, and tokens_at_once tokens: the longest window has 8."""
    neural, seen = compact(model, 4), []

    def hidden(tokens):
        seen.append(tuple(tokens.shape))
        return model.hidden(tokens)

    monkeypatch.setattr(likelihood, "CPU_TOKENS", tokens_at_once)
    windows = list(likelihood.evaluation_windows(split, 8))
    found = list(target_nats(replace(neural, hidden=hidden), iter(windows)))
    lengths = [len(window.tokens) for window, _ in found]
    assert lengths == sorted((len(window.tokens) for window in windows), reverse=True)
    assert seen[0] == (least, 8)
    assert all(rows == 1 or rows * length <= tokens_at_once for rows, length in seen)
    assert sum(rows for rows, _ in seen) == len(windows)


def test_windows_are_drawn_as_they_are_needed(split, model, monkeypatch):
    """Of a corpus larger than memory no more than SORTED_WINDOWS are held."""
    monkeypatch.setattr(likelihood, "SORTED_WINDOWS", 4)
    windows, drawn = list(likelihood.evaluation_windows(split, 8)), []

    def given():
        for window in windows:
            drawn.append(window)
            yield window

    scored = target_nats(compact(model, 2), given())
    for count in range(len(windows)):
        next(scored)
        assert len(drawn) == min(len(windows), 4 * (count // 4 + 1))


def test_who_waits_is_told_how_many_windows_are_done(split, model):
    told = []
    compact(model, 3).score(split, 8, lambda done, total, figures=None: told.append((done, total, figures)))
    count = len(list(likelihood.evaluation_windows(split, 8)))
    assert [(done, total) for done, total, _ in told] == [(done, count) for done in range(3, count, 3)] + [
        (count, count)
    ]
    for _, _, figures in told[:-1]:
        ((name, value),) = figures.items()
        assert name == "tokens/s"
        assert float(value.replace(",", "")) > 0
    assert told[-1][2] is None


def test_logits_never_exist_for_more_than_a_chunk_of_places(encoding, split, model, monkeypatch):
    neural, seen = compact(model, 9), []

    def score(logits, targets):
        seen.append(len(logits))
        return F.cross_entropy(logits, targets, reduction="none")

    monkeypatch.setattr(likelihood, "HEAD_ROWS", 5)
    windows = list(neural.windows(split, LIKELIHOOD.window))
    nats = sum(values.sum() for _, values in likelihood.score_targets(neural, windows, score))
    assert nats == pytest.approx(evaluate(neural, split, encoding, LIKELIHOOD).nats.sum(), rel=1e-6)
    assert max(seen) == 5
    assert sum(seen) == sum(len(window.targets) for window in windows)


def test_a_model_of_zeros_knows_nothing_but_the_size_of_the_real_vocabulary(encoding, split, model):
    """The known answer: ln(vocab_size), not ln(padded_vocab_size)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = summary(compact(model, 4), split, encoding)
    assert report["loss"]["value"] == pytest.approx(math.log(model.shape.vocab_size), rel=1e-6)
    assert report["loss"]["low"] == pytest.approx(report["loss"]["high"], rel=1e-6)
    assert report["perplexity"]["value"] == pytest.approx(model.shape.vocab_size, rel=1e-5)


def test_padding_rows_of_the_vocabulary_get_no_probability(encoding, split, model):
    expected = evaluate(compact(model, 4), split, encoding, LIKELIHOOD).nats
    with torch.no_grad():
        model.wte.weight[model.shape.vocab_size :] = 50.0
    np.testing.assert_array_equal(evaluate(compact(model, 4), split, encoding, LIKELIHOOD).nats, expected)


def test_a_target_is_scored_without_seeing_itself_or_what_follows(model):
    tokens, targets = np.arange(8), np.arange(1, 9)
    changed = tokens.copy()
    changed[5:] += 20
    one, other = (
        next(target_nats(compact(model, 1), [Window(0, 0, fed, targets)]))[1] for fed in (tokens, changed)
    )
    np.testing.assert_allclose(one[:5], other[:5], rtol=1e-6)
    assert np.abs(one[5:] - other[5:]).min() > 1e-3


def test_a_window_beyond_the_models_context_is_refused(encoding, split, model):
    told = "a window of 17 tokens does not fit the model's context of 16: lower evaluation.likelihood.window"
    with pytest.raises(BadConfig, match=f"^{told}$"):
        evaluate(compact(model, 4), split, encoding, LIKELIHOOD.model_copy(update={"window": 17}))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_document_without_finite_nats_is_named(encoding, split, bad):
    class Broken:
        facts = MappingProxyType({"kind": "broken"})

        def score(self, split, window, progress):
            return Nats(np.array([1.0, 2.0, bad, math.nan, 3.0]), None)

    told = (
        f"document {split.document_ids[2]} of {split.path} got {bad} nats: the model's weights or arithmetic "
        "are broken; train again or check the weights' source"
    )
    with pytest.raises(NotFinite, match=f"^{re.escape(told)}$"):
        evaluate(Broken(), split, encoding, LIKELIHOOD)


def test_a_view_that_gives_nan_is_named(encoding, split, model):
    """The last place of the context is never reached by windows of 8, but by the strided view's."""
    with torch.no_grad():
        model.wpe.weight[15] = math.nan
    assert np.isfinite(evaluate(compact(model, 4), split, encoding, LIKELIHOOD).nats).all()
    with pytest.raises(NotFinite, match="got nan nats"):
        evaluate(compact(model, 4), split, encoding, LIKELIHOOD, views=["strided"])


def test_a_split_without_tokens_is_refused(tmp_path, encoding, model):
    empty = save_split(tmp_path / "empty.tokens", encoding, texts=["", ""])
    told = f"{empty.path} has no token to score: add text, or raise tokenization.val_fraction"
    with pytest.raises(BadData, match=f"^{re.escape(told)}$"):
        evaluate(compact(model, 4), empty, encoding, LIKELIHOOD)
    one = save_split(tmp_path / "one.tokens", encoding, texts=["", "a"])
    assert evaluate(compact(model, 4), one, encoding, LIKELIHOOD).tokens.tolist() == [0, 1]


def test_a_split_of_another_tokenizer_is_refused(tmp_path, encoding, model):
    """A document whose ids spell 3 bytes where 4 were tokenized."""
    documents = [(bytes(16), 4, np.array(encoding.encode_ordinary("the"), np.int64))]
    about = {"vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token, "tokenizer_sha256": "0" * 64}
    write_token_file(tmp_path / "x.tokens", iter(documents), **about)
    told = (
        f"document {'0' * 32} of {tmp_path / 'x.tokens'} has 3 bytes where 4 were tokenized: "
        "run `dvc repro -f download tokenization`"
    )
    with pytest.raises(BadData, match=f"^{re.escape(told)}$"):
        evaluate(compact(model, 4), open_tokens(tmp_path / "x.tokens"), encoding, LIKELIHOOD)


def summary(model, split, encoding):
    found = evaluate(model, split, encoding, LIKELIHOOD)
    return likelihood.summarize("m", model, found, split, LIKELIHOOD)


def test_the_report_divides_sums_worked_by_hand(split):
    """Two documents and an empty one: 30 nats over 12 tokens and 40 bytes, 10 own tokens."""
    totals = Totals(["aa", "bb", "cc"], *(np.array(x) for x in ([10, 30, 0], [4, 8, 0], [4, 6, 0])), NATS)

    class Plain:
        facts = MappingProxyType({"kind": "k", "num_params": None})

    report = likelihood.summarize("x", Plain(), totals, split, LIKELIHOOD)
    assert report["model"] == {"name": "x", "kind": "k", "num_params": None}
    assert report["validation"] == {
        "sha256": sha256_file(split.path),
        "documents": 3,
        "tokens": 12,
        "bytes": 40,
        "words": None,
    }
    assert report["loss"]["value"] == pytest.approx(2.5)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(2.5))
    assert report["bits_per_byte"]["value"] == pytest.approx(30 / 40 / math.log(2))
    assert (report["own_tokens"], report["loss_per_own_token"]) == (10, pytest.approx(3.0))
    assert report["word_perplexity"] is None  # nobody counted words
    assert (report["window"], "views" in report, "by_position" in report) == (8, False, False)
    expected = ratio_bootstrap(NATS[:2], np.array([10.0, 30.0]), resamples=50, seed=1)
    assert report["bits_per_byte"]["low"] == pytest.approx(expected.low / math.log(2))
    assert report["perplexity"]["high"] == pytest.approx(math.exp(report["loss"]["high"]))


NATS = np.array([18.0, 12.0, 0.0])


def test_a_model_without_tokens_has_no_loss_per_own_token(encoding, split):
    class Compressor:
        facts = MappingProxyType({"kind": "compressor"})

        def score(self, split, window, progress):
            return Nats(np.ones(split.header.documents), None)

    report = summary(Compressor(), split, encoding)
    assert report["own_tokens"] is None
    assert report["loss_per_own_token"] is None


@pytest.mark.parametrize("counts", [None, np.array([3, 4])])
def test_sums_by_document_come_back_and_have_one_byte_form(tmp_path, counts):
    columns = {"bytes": np.array([10, 30]), "tokens": np.array([4, 8]), "nats": np.array([1.25, 1 / 3])}
    views = {"strided": np.array([1.0, 0.25])}
    totals = Totals(["aa", "bb"], own_tokens=counts, words=counts, views=views, **columns)
    for name in ("one", "two"):
        likelihood.write_totals(tmp_path / name, totals)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = likelihood.read_totals(tmp_path / "one")
    assert found.ids == totals.ids
    for column, expected in columns.items():
        np.testing.assert_array_equal(getattr(found, column), expected)
    for column in (found.own_tokens, found.words):
        assert column is None if counts is None else column.tolist() == [3, 4]
    assert {name: nats.tolist() for name, nats in found.views.items()} == {"strided": [1.0, 0.25]}


GOOD = {
    "id": ["aa", "bb"], "bytes": [10, 30], "tokens": [4, 8], "own_tokens": [4, 6], "words": [2, 5],
    "nats": [1.25, 0.5], "nats_strided": [1.0, 0.25],
}  # fmt: skip


def test_sums_are_compressed_columns_of_plain_types(tmp_path):
    views = {"strided": np.array([1.0, 0.25])}
    counts = {name: np.array(GOOD[name]) for name in ("bytes", "tokens", "own_tokens", "words")}
    totals = Totals(GOOD["id"], **counts, nats=np.array(GOOD["nats"]), views=views)
    likelihood.write_totals(tmp_path / "x.parquet", totals)
    file = parquet.ParquetFile(tmp_path / "x.parquet")
    assert file.read().to_pydict() == GOOD
    types = {field.name: str(field.type) for field in file.schema_arrow}
    kinds = {"id": "string", "nats": "double", "nats_strided": "double"}
    assert types == {name: kinds.get(name, "int64") for name in GOOD}
    row = file.metadata.row_group(0)
    assert {row.column(place).compression for place in range(len(GOOD))} == {"ZSTD"}


def test_sums_of_before_had_no_words(tmp_path):
    columns = {name: values for name, values in GOOD.items() if name != "words"}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    found = likelihood.read_totals(tmp_path / "x.parquet")
    assert found.words is None
    assert found.own_tokens.tolist() == [4, 6]


@pytest.mark.parametrize(
    "change",
    [
        *({name: [1.0, 2.0]} for name in ("bytes", "tokens", "own_tokens", "words")),
        *({name: [1, -1]} for name in ("bytes", "tokens", "own_tokens", "words")),
        *({name: [1, 2]} for name in ("nats", "nats_strided", "id")),
        *({name: [1.0, bad]} for name in ("nats", "nats_strided") for bad in (math.nan, math.inf)),
        *({name: [None, 1]} for name in ("bytes", "tokens", "nats", "nats_strided")),
        {"id": ["aa", None]},
        *({name: None} for name in ("id", "bytes", "tokens", "own_tokens", "nats")),
    ],
    ids=str,
)
def test_sums_of_other_types_and_signs_are_refused(tmp_path, change):
    table = {name: change.get(name, values) for name, values in GOOD.items()}
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({n: values for n, values in table.items() if values is not None}), path)
    with pytest.raises(BadData, match=f"^{re.escape(str(path))} is damaged: delete it and run `dvc repro`$"):
        likelihood.read_totals(path)


def test_no_documents_and_zeros_are_sums_too(tmp_path):
    for rows in (0, 1):
        columns = {
            name: values[:rows] for name, values in {**GOOD, "tokens": [0, 0], "nats": [0.0, 0.0]}.items()
        }
        schema = [(n, "string" if n == "id" else "double" if n.startswith("nats") else "int64") for n in GOOD]
        parquet.write_table(pyarrow.table(columns, pyarrow.schema(schema)), tmp_path / "x.parquet")
        assert likelihood.read_totals(tmp_path / "x.parquet").tokens.tolist() == [0] * rows


def test_missing_and_damaged_sums_are_named(tmp_path):
    path = tmp_path / "nothing.parquet"
    with pytest.raises(
        MissingInput, match=f"^{re.escape(str(path))} is missing: run `dvc repro` to make it$"
    ):
        likelihood.read_totals(path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(BadData, match=r"bad\.parquet is damaged"):
        likelihood.read_totals(tmp_path / "bad.parquet")


def test_the_room_waits_for_no_torch_and_knows_no_transformers():
    """A compressor's stage must not pay for them."""
    code = (
        "import sys, compactgpt.evaluation.likelihood, compactgpt.baseline\n"
        "print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_door_measures_and_writes_the_same_bytes_twice(tmp_path, encoding, split, model, monkeypatch):
    from stages.evaluation import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    save_params(tmp_path / "params.yaml", lambda tree: None)
    save_model(model, tmp_path / "models/compact", {})
    words = ["--tokens", ".", "--tokenizer", "tokenizer", "--tracker", "none"]
    made = []
    for _ in range(2):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        names = [
            f"reports/{name}" for name in ("evaluation.json", "metrics.json", "samples.json", "samples.md")
        ]
        made.append([(tmp_path / name).read_bytes() for name in [*names, "data/evaluation/compact.parquet"]])
    assert made[0] == made[1]
    report = json.loads(made[0][0])
    assert report["model"]["num_params"] == model.num_params
    expected = plain_nats(model, split, 8).sum() / report["validation"]["tokens"]
    assert report["loss"]["value"] == pytest.approx(expected, rel=1e-6)
    assert report["views"]["strided"]["context"] == 16
    few = json.loads(made[0][1])
    assert few["perplexity"] == report["perplexity"]["value"]
    assert few["bits_per_byte"] == report["bits_per_byte"]["value"]
    assert len(few) < 10
    assert report["tasks"] == {}  # no word of four letters comes twice in the tiny texts
    assert set(report["text"]["statistics"]) == {"greedy", "top_k", "nucleus", "human"}
    assert len(read_json(tmp_path / "reports/samples.json")["samples"]) == 6


def test_the_door_says_what_is_missing(tmp_path, monkeypatch):
    from stages.evaluation import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    save_params(tmp_path / "params.yaml", lambda tree: None)
    result = CliRunner().invoke(app, ["--tracker", "none"])
    assert result.exit_code == MissingInput.exit_code
    assert result.output.count("\n") == 1
    assert not (tmp_path / "reports").exists()
