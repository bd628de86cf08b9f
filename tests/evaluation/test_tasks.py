"""Tasks: items and answers equal plain computations; the tokens are those that the harness would score."""

import json
import math

import numpy as np
import pytest
import torch

from compactgpt.common.errors import BadData, MissingInput, Unreachable
from compactgpt.common.storage import sha256_file
from compactgpt.config import Source, load_params
from compactgpt.evaluation import tasks
from compactgpt.evaluation.compact import as_neural_model, plain_codec
from compactgpt.evaluation.tasks import Item
from compactgpt.model.huggingface import save_hf
from tests.support.tiny_models import LIKELIHOOD, ROOT, save_split

PASSAGES = ["the cat in the hat sat in the hat", "there is another weather in the other weather"]
SETTINGS = load_params(ROOT / "params.yaml").evaluation.tasks


@pytest.fixture
def lambada(tmp_path):
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return path


def test_a_target_is_what_follows_the_last_space(lambada):
    assert tasks.read_lambada(lambada) == [
        Item("the cat in the hat sat in the", " hat"),
        Item("there is another weather in the other", " weather"),
    ]


@pytest.mark.parametrize("line", ['{"text": "word"}', '{"words": "a b"}', "a b"])
def test_another_form_is_refused(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(BadData, match="is not a LAMBADA file"):
        tasks.read_lambada(tmp_path / "x.jsonl")


def test_the_target_is_what_the_contexts_own_tokens_leave_over(encoding):
    codec = plain_codec(encoding)
    window = tasks.item_window(codec, Item("the cat", " in"), 5, 100)
    whole = encoding.encode_ordinary("the cat in")
    assert window.document == 5
    assert window.tokens.tolist() == whole[:-1]
    assert encoding.decode(window.targets.tolist()) == " in"
    short = tasks.item_window(codec, Item("the cat", " in"), 0, 3)
    assert short.tokens.tolist() == whole[-4:-1]
    alone = tasks.item_window(codec, Item("", "the"), 0, 100)
    assert alone.tokens.tolist()[0] == encoding.eot_token
    assert encoding.decode(alone.targets.tolist()) == "the"


def plain_logits(model, fed):
    with torch.no_grad():
        hidden = model.double().eval().hidden(torch.tensor([fed[-16:]]))[0]
        logits = hidden @ model.wte.weight[: model.shape.vocab_size].T
    model.float()
    return logits


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_equal_a_plain_computation(encoding, model, lambada, batch_size):
    items = [*tasks.read_lambada(lambada), Item("the", " hat"), Item("a", "n")]
    items.append(
        Item("the", encoding.decode([int(plain_logits(model, [*encoding.encode("the")])[-1].argmax())]))
    )
    found, last = tasks.answer(as_neural_model(model, batch_size, encoding), items)
    for item, nats, hit in zip(items, found.nats, found.hits, strict=True):
        whole = encoding.encode_ordinary(item.context + item.target)
        n = len(whole) - len(encoding.encode_ordinary(item.context))
        logits = plain_logits(model, whole[:-1])[-n:]
        targets = torch.tensor(whole[-n:])
        assert nats == pytest.approx(-torch.log_softmax(logits, 1)[range(n), targets].sum().item(), rel=1e-5)
        assert hit == (logits.argmax(1) == targets).all().item()
    assert found.hits[-1]
    assert (last.nats <= found.nats).all()


def test_the_last_token_variant_excludes_stop_words_from_the_choice(encoding, model):
    the = encoding.encode_ordinary(" the")[0]
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[the] * 100)  # whatever it reads, it expects " the"
    second = torch.topk(plain_logits(model, [the])[-1], 2).indices[1].item()
    items = [Item("cat in", " the"), Item("cat", encoding.decode([second]))]
    whole, last = tasks.answer(as_neural_model(model, 2, encoding), items)
    assert whole.hits.tolist() == [True, False]
    assert last.hits.tolist() == [False, True]


def test_the_cloze_is_a_function_of_the_documents(tmp_path, encoding):
    text = " ".join(f"some words stand here and there{n} words again while others follow" for n in range(9))
    settings = SETTINGS.model_copy(update={"cloze_items": 5, "cloze_characters": 130})
    split = save_split(tmp_path / "a.tokens", encoding, texts=[text, "too short", text + " more words"])
    items = tasks.make_cloze(split, encoding, settings)
    assert items == tasks.make_cloze(split, encoding, settings)
    assert 2 < len(items) <= 5
    for item in items:
        assert item.target[0] == " "
        assert len(item.target) > 4
        assert item.target[1:] in item.context.split()
        assert 65 <= len(item.context) <= 130
        assert text.find(item.context + item.target) >= 0
        assert item.context[0] != " "
    grown = save_split(
        tmp_path / "b.tokens", encoding, texts=[text, "too short", text + " more words", "new"]
    )
    assert tasks.make_cloze(grown, encoding, settings) == items


def test_the_report_counts_and_keeps_each_answer():
    items = [Item("a", " b"), Item("c", " d"), Item("e", " f"), Item("g", " h")]
    answers = tasks.Answers(np.array([1.0, 2.0, 3.0, 2.0]), np.array([True, False, False, True]))
    report = tasks.answer_figures(items, answers, LIKELIHOOD)
    assert report["accuracy"]["value"] == 0.5
    assert report["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert (report["items"], report["hits"]) == (4, "1001")
    other = tasks.answer_figures([*items[:3], Item("g", " i")], answers, LIKELIHOOD)
    assert report["items_sha256"] != other["items_sha256"]


def test_lambada_runs_in_every_variant_that_has_a_file(tmp_path, encoding, model, lambada):
    split = save_split(tmp_path / "val.tokens", encoding)
    source = Source(path=str(lambada), sha256=sha256_file(lambada))
    settings = SETTINGS.model_copy(update={"lambada": source, "lambada_original": source, "cloze_items": 0})
    found = tasks.run_tasks(as_neural_model(model, 2, encoding), split, encoding, settings, LIKELIHOOD)
    assert sorted(found) == ["lambada_last_token", "lambada_original", "lambada_word"]
    assert found["lambada_word"] == found["lambada_original"]


def test_a_file_is_the_one_by_hash_or_refused(lambada):
    with pytest.raises(BadData, match="has SHA-256"):
        tasks.fetch_source(Source(path=str(lambada), sha256="0" * 64))
    with pytest.raises(MissingInput, match="nowhere is missing"):
        tasks.fetch_source(Source(path="nowhere", sha256="0" * 64))
    hub = Source(repo="some/set", revision="a" * 40, file="x.jsonl", sha256="0" * 64)
    with pytest.raises(Unreachable, match=r"the hub can't be reached for some/set .*evaluation\.tasks"):
        tasks.fetch_source(hub)


@pytest.mark.parametrize("place", [{}, {"path": "x", "repo": "a/b"}, {"repo": "a/b", "file": "c"}])
def test_a_source_has_one_place(place):
    with pytest.raises(ValueError, match="either path, or repo"):
        Source(**place, sha256="0" * 64)


def test_lm_eval_on_the_export_gives_our_lambada(tmp_path, lambada, encoding, model):
    """The command of docs/tutorial.md: lm_eval --model hf --model_args pretrained=FOLDER."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm-eval==0.4.13")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    save_hf(model, tmp_path / "hf", tmp_path / "tokenizer")
    task = ConfigurableTask(config=lambada_config(lambada))
    found = simple_evaluate(
        "hf", model_args=f"pretrained={tmp_path / 'hf'}", tasks=[task], device="cpu", bootstrap_iters=0
    )["results"]["lambada_local"]
    answers, _ = tasks.answer(as_neural_model(model, 2, encoding), tasks.read_lambada(lambada))
    assert found["acc,none"] == pytest.approx(answers.hits.mean())
    assert found["perplexity,none"] == pytest.approx(float(np.exp(answers.nats.mean())), rel=1e-5)


def lambada_config(path):
    """lm_eval/tasks/lambada/lambada_openai.yaml with the file of a local folder."""
    return {
        "task": "lambada_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
