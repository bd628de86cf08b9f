"""Evaluation: every token once, whatever the batch; figures that a plain computation gives as well."""

import json
import math
import subprocess
import sys
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from compactgpt import evaluation
from compactgpt.checkpoint import save_model
from compactgpt.compact import compact
from compactgpt.data import Window
from compactgpt.errors import BadConfig, BadData, MissingInput, NotFinite
from compactgpt.evaluation import Nats, Totals, evaluate, target_nats
from compactgpt.metrics import ratio_bootstrap
from compactgpt.storage import read_json, sha256_file
from tests.tiny import LIKELIHOOD, TEXTS, save_params, save_split, save_tokenizer, tiny_gpt


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
    found = list(target_nats(compact(model, 4), evaluation.evaluation_windows(split, window)))
    for document in range(split.header.documents):
        mine = sorted((w for w, _ in found if w.document == document), key=lambda w: w.start)
        tokens = split.document(document)
        assert np.concatenate([w.targets for w in mine]).tolist() == tokens.tolist()
        for one in mine:
            before = split.header.eot_token if one.start == 0 else tokens[one.start - 1]
            assert one.tokens.tolist() == [before, *one.targets[:-1].tolist()]
            assert len(one.targets) <= window
    assert all(len(values) == len(one.targets) for one, values in found)


def test_nats_equal_a_plain_computation_from_all_logits(split, model):
    found = evaluate(compact(model, 3), split, LIKELIHOOD)
    np.testing.assert_allclose(found.nats, plain_nats(model, split, 8), rtol=1e-6)
    assert found.tokens.tolist() == found.own_tokens.tolist()
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_results_do_not_depend_on_the_batch_size(split, model, batch_size):
    expected = evaluate(compact(model, 3), split, LIKELIHOOD).nats
    np.testing.assert_allclose(
        evaluate(compact(model, batch_size), split, LIKELIHOOD).nats, expected, rtol=1e-6
    )


def test_results_do_not_depend_on_how_many_windows_are_sorted_together(split, model, monkeypatch):
    expected = evaluate(compact(model, 3), split, LIKELIHOOD).nats
    monkeypatch.setattr(evaluation, "SORTED_WINDOWS", 2)
    np.testing.assert_allclose(evaluate(compact(model, 3), split, LIKELIHOOD).nats, expected, rtol=1e-6)


def test_logits_never_exist_for_more_than_a_chunk_of_places(split, model, monkeypatch):
    expected, seen = evaluate(compact(model, 9), split, LIKELIHOOD).nats, []

    def spy(logits, targets, **kwargs):
        seen.append(len(logits))
        return F.nll_loss(F.log_softmax(logits, 1), targets, **kwargs)

    monkeypatch.setattr(evaluation, "HEAD_ROWS", 5)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    found = evaluate(compact(model, 9), split, LIKELIHOOD)
    np.testing.assert_allclose(found.nats, expected, rtol=1e-6)
    assert max(seen) == 5
    assert sum(seen) == found.tokens.sum()


def test_a_model_of_zeros_knows_nothing_but_the_size_of_the_real_vocabulary(split, model):
    """The known answer: ln(vocab_size), not ln(padded_vocab_size)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = summary(compact(model, 4), split)
    assert report["loss"]["value"] == pytest.approx(math.log(model.shape.vocab_size), rel=1e-6)
    assert report["loss"]["low"] == pytest.approx(report["loss"]["high"], rel=1e-6)
    assert report["perplexity"]["value"] == pytest.approx(model.shape.vocab_size, rel=1e-5)


def test_padding_rows_of_the_vocabulary_get_no_probability(split, model):
    expected = evaluate(compact(model, 4), split, LIKELIHOOD).nats
    with torch.no_grad():
        model.wte.weight[model.shape.vocab_size :] = 50.0
    np.testing.assert_array_equal(evaluate(compact(model, 4), split, LIKELIHOOD).nats, expected)


def test_a_target_is_scored_without_seeing_itself_or_what_follows(model):
    tokens, targets = np.arange(8), np.arange(1, 9)
    changed = tokens.copy()
    changed[5:] += 20
    one, other = (
        next(target_nats(compact(model, 1), [Window(0, 0, fed, targets)]))[1] for fed in (tokens, changed)
    )
    np.testing.assert_allclose(one[:5], other[:5], rtol=1e-6)
    assert np.abs(one[5:] - other[5:]).min() > 1e-3


def test_a_window_beyond_the_models_context_is_refused(split, model):
    with pytest.raises(BadConfig, match=r"17 tokens does not fit the model's context of 16"):
        evaluate(compact(model, 4), split, LIKELIHOOD.model_copy(update={"window": 17}))


def test_a_model_that_gives_nan_is_named_with_its_document(split, model):
    with torch.no_grad():
        model.wte.weight[split.document(2)[0]] = math.nan
    with pytest.raises(NotFinite, match="got nan nats"):
        evaluate(compact(model, 4), split, LIKELIHOOD)


def test_a_split_without_tokens_is_refused(tmp_path, encoding, model):
    empty = save_split(tmp_path / "empty.tokens", encoding, texts=["", ""])
    with pytest.raises(BadData, match="no token to score"):
        evaluate(compact(model, 4), empty, LIKELIHOOD)


def summary(model, split):
    return evaluation.summarize("m", model.facts, evaluate(model, split, LIKELIHOOD), split, LIKELIHOOD)


def test_the_report_divides_sums_worked_by_hand(split):
    """Two documents and an empty one: 30 nats over 12 tokens and 40 bytes, 10 own tokens."""
    totals = Totals(["aa", "bb", "cc"], *(np.array(x) for x in ([10, 30, 0], [4, 8, 0], [4, 6, 0])), NATS)
    report = evaluation.summarize("x", {"kind": "k", "num_params": None}, totals, split, LIKELIHOOD)
    assert report["model"] == {"name": "x", "kind": "k", "num_params": None}
    assert report["validation"] == {
        "sha256": sha256_file(split.path),
        "documents": 3,
        "tokens": 12,
        "bytes": 40,
    }
    assert report["loss"]["value"] == pytest.approx(2.5)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(2.5))
    assert report["bits_per_byte"]["value"] == pytest.approx(30 / 40 / math.log(2))
    assert (report["own_tokens"], report["loss_per_own_token"]) == (10, pytest.approx(3.0))
    expected = ratio_bootstrap(NATS[:2], np.array([10.0, 30.0]), resamples=50, seed=1)
    assert report["bits_per_byte"]["low"] == pytest.approx(expected.low / math.log(2))
    assert report["perplexity"]["high"] == pytest.approx(math.exp(report["loss"]["high"]))


NATS = np.array([18.0, 12.0, 0.0])


def test_a_model_without_tokens_has_no_loss_per_own_token(split):
    class Compressor:
        facts = MappingProxyType({"kind": "compressor"})

        def score(self, split, window, progress):
            return Nats(np.ones(split.header.documents), None)

    report = summary(Compressor(), split)
    assert report["own_tokens"] is None
    assert report["loss_per_own_token"] is None


@pytest.mark.parametrize("own_tokens", [None, np.array([3, 4])])
def test_sums_by_document_come_back_and_have_one_byte_form(tmp_path, own_tokens):
    totals = Totals(["aa", "bb"], np.array([10, 30]), np.array([4, 8]), own_tokens, np.array([1.25, 1 / 3]))
    for name in ("one", "two"):
        evaluation.write_totals(tmp_path / name, totals)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = evaluation.read_totals(tmp_path / "one")
    assert found.ids == totals.ids
    for column in ("bytes", "tokens", "nats"):
        np.testing.assert_array_equal(getattr(found, column), getattr(totals, column))
    assert found.own_tokens is None if own_tokens is None else found.own_tokens.tolist() == [3, 4]


def test_missing_and_damaged_sums_are_named(tmp_path):
    with pytest.raises(MissingInput, match=r"nothing\.parquet is missing"):
        evaluation.read_totals(tmp_path / "nothing.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(BadData, match=r"bad\.parquet is damaged"):
        evaluation.read_totals(tmp_path / "bad.parquet")


def test_the_room_waits_for_no_torch_and_knows_no_transformers():
    """A compressor's stage must not pay for them."""
    code = (
        "import sys, compactgpt.evaluation, compactgpt.baseline\n"
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
        names = ["reports/evaluation.json", "reports/samples.json", "reports/samples.md"]
        made.append([(tmp_path / name).read_bytes() for name in [*names, "data/evaluation/compact.parquet"]])
    assert made[0] == made[1]
    report = json.loads(made[0][0])
    assert report["model"]["num_params"] == model.num_params
    expected = plain_nats(model, split, 8).sum() / report["validation"]["tokens"]
    assert report["loss"]["value"] == pytest.approx(expected, rel=1e-6)
    assert len(read_json(tmp_path / "reports/samples.json")["samples"]) == 4


def test_the_door_says_what_is_missing(tmp_path, monkeypatch):
    from stages.evaluation import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    save_params(tmp_path / "params.yaml", lambda tree: None)
    result = CliRunner().invoke(app, ["--tracker", "none"])
    assert result.exit_code == MissingInput.exit_code
    assert result.output.count("\n") == 1
    assert not (tmp_path / "reports").exists()
