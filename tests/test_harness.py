"""The harness and we score the same items alike."""

import json
import sys

import numpy as np
import pytest
import torch

from compactgpt import harness, tasks
from compactgpt.compact import compact
from compactgpt.errors import MissingInput
from compactgpt.harness import harness_model
from tests.tiny import save_tokenizer, tiny_gpt

PASSAGES = [
    "the cat in the hat sat in the hat",
    "there is another weather in the other weather",
    "a the in a",
]


@pytest.fixture
def model(tmp_path):
    encoding = save_tokenizer(tmp_path / "tokenizer")
    return compact(tiny_gpt(encoding.n_vocab), 2, encoding)


def test_without_the_harness_its_absence_is_one_sentence(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingInput, match="lm_eval is not installed"):
        harness_model(model)


def test_our_lambada_is_the_harnesss_on_the_same_items(tmp_path, model):
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install lm-eval==0.4.13")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    task = ConfigurableTask(config=lambada_config(path))
    found = simple_evaluate(harness_model(model), tasks=[task], bootstrap_iters=0)["results"]["lambada_local"]
    items = tasks.read_lambada(path)
    answers = tasks.ask(model, items)
    assert found["acc,none"] == pytest.approx(answers.hits.mean())
    assert found["perplexity,none"] == pytest.approx(float(np.exp(answers.nats.mean())), rel=1e-6)


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


def test_a_continuation_has_the_sum_of_its_tokens_log_probabilities(model):
    contexts = [model.codec.encode(text) for text in ("the cat", "in the hat a")]
    for context in contexts:
        logits = model.hidden(torch.tensor([context])) @ model.head.T
        greedy = int(logits[0, -1].argmax())
        other = (greedy + 1) % len(model.head)
        pairs = [(context, [greedy, other]), (context, [greedy])]
        (both, _), (first, hit) = harness._answers(model, pairs)
        logits = model.hidden(torch.tensor([[*context, greedy]])) @ model.head.T
        logs = torch.log_softmax(logits[0, -2:].double(), 1)
        assert first == pytest.approx(logs[0, greedy].item(), rel=1e-5)
        assert both == pytest.approx((logs[0, greedy] + logs[1, other]).item(), rel=1e-5)
        assert hit


def test_a_context_that_is_too_long_loses_its_beginning(model):
    long = model.codec.encode("the cat in the hat sat in the hat")
    assert len(long) > model.block_size
    (whole,) = harness._answers(model, [(long, [1])])
    assert whole == harness._answers(model, [(long[-model.block_size :], [1])])[0]


def test_writing_is_greedy_and_ends_before_the_words_that_a_task_names(model):
    prompt = "the cat in"
    written = harness._written(model, model.codec, prompt, {"max_gen_toks": 4})
    fed = model.codec.encode(prompt)
    for _ in range(4):
        logits = model.hidden(torch.tensor([fed])) @ model.head.T
        fed.append(int(logits[0, -1].argmax()))
    assert written == model.codec.decode(fed[-4:])
    stop = written[-1]
    settings = {"max_gen_toks": 4, "until": ["not there", stop]}
    assert harness._written(model, model.codec, prompt, settings) == written[: written.index(stop)]
