"""Tasks: items and answers equal plain computations; the tokens are those that the harness would score."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import json_bytes, sha256_file
from compactgpt.config import Source, load_params
from compactgpt.evaluation import tasks
from compactgpt.evaluation.compact import as_neural_model
from compactgpt.evaluation.tasks import Item
from tests.evaluation.plain_model import plain_logits, plain_nats
from tests.support.tiny_models import ROOT, save_split

PASSAGES = ["the cat in the hat sat in the hat", "there is another weather in the other weather"]
SETTINGS = load_params(ROOT / "params.yaml").evaluation.tasks


@pytest.fixture
def lambada(tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return path


def test_a_target_is_what_follows_the_last_space(tmp_path, lambada):
    assert tasks.read_lambada(lambada)[0] == Item("the cat in the hat sat in the", " hat")
    for line in ('{"text": "word"}', '{"words": "a b"}', "a b"):
        (tmp_path / "x.jsonl").write_text(line)
        with pytest.raises(BadData, match="is not a LAMBADA file"):
            tasks.read_lambada(tmp_path / "x.jsonl")


def test_the_target_is_what_the_contexts_own_tokens_leave_over(model, encoding):
    codec = as_neural_model(model, 1, encoding).codec
    window = tasks.item_window(codec, Item("the cat", " in"), 5, 100)
    whole = encoding.encode_ordinary("the cat in")
    assert (window.document, window.tokens.tolist()) == (5, whole[:-1])
    assert encoding.decode(window.targets.tolist()) == " in"
    short = tasks.item_window(codec, Item("the cat", " in"), 0, 3)
    assert short.tokens.tolist() == whole[-4:-1]
    alone = tasks.item_window(codec, Item("", "the"), 0, 100)
    assert alone.tokens.tolist()[0] == encoding.eot_token
    assert encoding.decode(alone.targets.tolist()) == "the"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_equal_a_plain_computation(encoding, model, lambada, batch_size):
    items = [*tasks.read_lambada(lambada), Item("the", " hat"), Item("a", "n")]
    likeliest = int(plain_logits(model, [*encoding.encode("the")])[-1].argmax())
    items.append(Item("the", encoding.decode([likeliest])))
    found = tasks.answer(as_neural_model(model, batch_size, encoding), items)
    for scores, item in zip(found, items, strict=True):
        whole = encoding.encode_ordinary(item.context + item.target)
        n = len(whole) - len(encoding.encode_ordinary(item.context))
        logits, targets = plain_logits(model, whole[:-1])[-n:], torch.tensor(whole[-n:])
        nats = -torch.log_softmax(logits, 1)[range(n), targets]
        assert scores[:, 0] == pytest.approx(nats.numpy(), rel=1e-5)
        assert scores[:, 1].tolist() == (logits.argmax(1) == targets).tolist()
    assert found[-1][:, 1].all()


def test_the_last_token_variant_excludes_stop_words_from_the_choice(encoding, model):
    the = encoding.encode_ordinary(" the")[0]
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[the] * 100)  # whatever it reads, it expects " the"
    second = torch.topk(plain_logits(model, [the])[-1], 2).indices[1].item()
    items = [Item("cat in", " the"), Item("cat", encoding.decode([second]))]
    scores = tasks.answer(as_neural_model(model, 2, encoding), items)
    assert [each[-1, 1:].tolist() for each in scores] == [[1, 0], [0, 1]]


def test_the_cloze_is_a_function_of_the_documents(tmp_path, encoding):
    text = " ".join(f"some words stand here and there{n} words again while others follow" for n in range(9))
    settings = SETTINGS.model_copy(update={"cloze_items": 5, "cloze_characters": 130})
    texts = [text, "too short", text + " more words"]
    items = tasks.make_cloze(save_split(tmp_path / "a.tokens", encoding, texts=texts), encoding, settings)
    assert len(items) == 5
    for item in items:
        assert len(item.target) > 4
        assert item.target[1:] in item.context.split()
        assert 65 <= len(item.context) <= 130
        assert text.find(item.context + item.target) >= 0
        assert (item.target[0], item.context[0] != " ") == (" ", True)
    grown = save_split(tmp_path / "b.tokens", encoding, texts=[*texts, "new"])
    assert tasks.make_cloze(grown, encoding, settings) == items


def test_each_task_that_has_a_file_runs(tmp_path, encoding, model, split, lambada):
    (tmp_path / "wiki.raw").write_text(" = The Hat = \n the cat in the hat \n" * 9)
    files = (lambada, tmp_path / "wiki.raw")
    source, wiki = (Source(path=str(path), sha256=sha256_file(path)) for path in files)
    changes = {"lambada": source, "lambada_original": source, "cloze_items": 0}
    changes |= {"wikitext": {"wikitext-2": wiki}, "wikitext_stride": 8}
    settings = SETTINGS.model_copy(update=changes)
    found = tasks.run_tasks(as_neural_model(model, 2, encoding), split, encoding, settings)
    assert sorted(found) == ["lambada_last_token", "lambada_original", "lambada_word", "wikitext-2"]
    assert found["lambada_word"] == found["lambada_original"]
    assert found["wikitext-2"]["sha256"] == wiki.sha256


def test_the_report_keeps_each_answer_and_is_valid_json_for_a_diverged_model(encoding, model):
    items = [Item("a", " b"), Item("c", " d"), Item("e", " f"), Item("g", " h")]
    nats, hits = np.array([1.0, 2.0, 3.0, 2.0]), np.array([True, False, False, True])
    report = tasks.answer_figures(items, nats, hits)
    assert report["accuracy"]["value"] == 0.5
    assert report["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert (report["items"], report["hits"]) == (4, "1001")
    other = tasks.answer_figures([*items[:3], Item("g", " i")], nats, hits)
    assert report["items_sha256"] != other["items_sha256"]
    assert tasks.answer_figures(items, nats * 1e6, hits)["perplexity"] is None
    neural = as_neural_model(model, 2, encoding)
    broken = replace(neural, head=neural.head * 1e5)
    found = tasks.score_wikitext(broken, [" = The Hat = \n", " the cat in the hat \n"], 16, 8)
    assert found["no_overlap"]["perplexity"] is found["per_word"]["word_perplexity"] is None
    json_bytes(found)


def test_a_file_is_the_one_with_the_hash_or_refused(lambada):
    with pytest.raises(BadData, match="has SHA-256"):
        tasks.fetch_source(Source(path=str(lambada), sha256="0" * 64))
    with pytest.raises(MissingInput, match="nowhere is missing"):
        tasks.fetch_source(Source(path="nowhere", sha256="0" * 64))
    hub = Source(repo="some/set", revision="a" * 40, file="x.jsonl", sha256="0" * 64)
    with pytest.raises(Unreachable, match=r"the hub can't be reached for some/set .*evaluation\.tasks"):
        tasks.fetch_source(hub)


LINES = ["", " = The Hat = \n", "", " the cat , in the ( other ) hat . \n", " = = Then = = \n"]
LINES += [" = A = \n", " in it \n"]


def test_both_forms_give_the_same_lines(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), tmp_path / "a.parquet")
    (tmp_path / "a.raw").write_text("".join(line or " \n" for line in LINES))
    for name in ("a.parquet", "a.raw"):
        assert tasks.read_lines(tmp_path / name) == LINES
    pyarrow.parquet.write_table(pyarrow.table({"words": LINES}), tmp_path / "b.parquet")
    with pytest.raises(BadData, match="is not WikiText"):
        tasks.read_lines(tmp_path / "b.parquet")


def test_pages_open_with_titles_and_lose_their_spacing():
    first, second = tasks.split_pages(LINES)
    assert first.startswith(" = The Hat = \n\n the cat")
    assert second == " = A = \n in it "
    assert tasks.detokenize(first) == " = The Hat =\n\nthe cat, in the (other) hat.\n== Then == "
    found = tasks.detokenize('dogs \' 1 @,@ 000 @.@ 5 [ a ] ; " b " at 3 ° N .')
    assert found == 'dogs\' 1,000.5 [a]; "b" at 3°N .'


@pytest.mark.parametrize(("length", "context", "stride"), [(20, 8, 8), (20, 8, 3), (17, 8, 4), (5, 8, 8)])
def test_blocks_are_those_of_transformers_perplexity_page(length, context, stride):
    """The page's own loop, with labels that the model shifts by one."""
    expected, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labels = [-100] * (end - begin - (end - before)) + list(range(before, end))
        scored = [label for label in labels[1:] if label != -100]
        expected.append((list(range(begin, end)), scored))
        before = end
        if end == length:
            break
    found = [(w.tokens.tolist(), w.targets.tolist()) for w in tasks.blocks(range(length), context, stride)]
    assert found == [(fed[:-1], scored) for fed, scored in expected if scored]


def test_the_protocols_equal_plain_computations(encoding, model):
    found = tasks.score_wikitext(as_neural_model(model, 3, encoding), LINES, 12, 5)
    ids = encoding.encode_ordinary("\n\n".join(LINES))
    parts = [ids[start : start + 12] for start in range(0, len(ids), 12)]
    count = sum(len(part) - 1 for part in parts)
    total = sum(plain_nats(model, part[:-1], part[1:]) for part in parts if len(part) > 1)
    assert found["no_overlap"]["own_tokens"] == count
    assert found["no_overlap"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["strided"]["own_tokens"] == len(ids) - 1
    texts, page_nats = tasks.split_pages(LINES), 0.0
    for text in texts:
        stream = [encoding.eot_token, *encoding.encode_ordinary(tasks.detokenize(text))]
        for position in range(0, len(stream) - 1, 12):
            end = min(position + 12, len(stream) - 1)
            page_nats += plain_nats(model, stream[max(0, end - 12) : end], stream[position + 1 : end + 1])
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert found["per_word"]["word_perplexity"] == pytest.approx(math.exp(page_nats / words), rel=1e-4)
    with pytest.raises(BadConfig, match="is above the context"):
        tasks.score_wikitext(as_neural_model(model, 3, encoding), LINES, 12, 13)
