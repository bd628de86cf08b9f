"""The harness and we score the same items alike."""

import json
import sys

import numpy as np
import pytest

from compactgpt import tasks
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
