"""The runs of a sweep are trained and scored once each, and a stopped sweep resumes."""

import json
import os
import shutil

import pytest
import yaml

from compactgpt.common.errors import BadConfig, Busy
from compactgpt.common.storage import atomic_folder, write_json, write_text
from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation import sweep_runs
from compactgpt.evaluation.sweep_runs import run_sweep
from compactgpt.forecast.sweep import documents_sha256, read_sweep
from tests.support.corpora import download_params, write_corpus
from tests.support.tiny_corpus import make_documents
from tests.support.tiny_models import save_split, save_tokenizer
from tests.support.tiny_training import params_tree

TEXTS = [f"hello well {'low ' * n}then {n}" for n in range(8)]
SWEEP = """purpose: p
needs: n
sweep:
  demo: {seeds: [1, 2]}
  tuned: {start: demo-1, train_source: tiny, params: {training.max_steps: 2}}
  part: {train_documents: 2, params: {model.dropout: 0.5, training.max_steps: 2}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with token files, params.yaml and the sweep `mine`."""
    encoding = save_tokenizer(tmp_path / "data/tokenizer")
    make_documents(tmp_path / "data/documents", TEXTS)
    with atomic_folder(tmp_path / "data/tokens") as folder:
        save_split(folder / "train.tokens", encoding, TEXTS[:5])
        save_split(folder / "val.tokens", encoding, TEXTS[5:])
    tree = params_tree(model={"vocab_size": encoding.n_vocab, "padded_vocab_size": encoding.n_vocab})
    tree["evaluation"]["likelihood"]["document_tokens"] = 6
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "conf/experiments").mkdir(parents=True)
    (tmp_path / "conf/experiments/mine.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use_own_text(project):
    """Replace the corpus by the same texts, read by `download.corpus: files` from files in corpus/."""
    for name, texts in (("a.txt", TEXTS[:5]), ("b/c.jsonl", [json.dumps(text) for text in TEXTS[5:]])):
        write_text(project / "corpus" / name, "\n".join(texts))
    params = download_params(corpus="files", files={"patterns": ["corpus/**"], "split": "lines"})
    shutil.rmtree(project / "data/documents")
    write_corpus(project, params)
    (project / "documents").rename(project / "data/documents")
    tree = yaml.safe_load((project / "params.yaml").read_text())
    tree["download"] = params.model_dump(mode="json")
    (project / "params.yaml").write_text(yaml.safe_dump(tree))
    text = SWEEP.replace("train_source: tiny", "train_source: corpus")
    (project / "conf/experiments/mine.yaml").write_text(text)


def run(project, *settings):
    messages = []
    path = project / "results/mine.json"
    run_sweep("mine", project / "params.yaml", settings, path, project / "states", messages.append)
    return [message.split(":")[0] for message in messages], read_sweep(path)


def test_each_run_is_trained_once_and_kept_with_its_losses_by_document(project):
    names, sweep = run(project)
    assert names == ["demo-1", "demo-2", "tuned", "part"]
    ids = open_tokens(project / "data/tokens/val.tokens").document_ids
    assert sweep.documents.tokens == (6, 6, 6)
    assert sweep.documents.sources == ("tiny",) * 3
    assert sweep.documents.ids_sha256 == documents_sha256(ids, [6, 6, 6])
    for found in sweep.runs:
        assert found.loss == pytest.approx(sum(found.nats) / 18)
    demo, other, tuned, part = sweep.runs
    assert (demo.seed, demo.max_steps, tuned.max_steps, part.params["model.dropout"]) == (1, 6, 2, 0.5)
    assert len({one.loss for one in (demo, other, tuned, part)}) == 4
    assert tuned.loss < other.loss  # it began with the trained weights
    assert os.listdir(project / "states") == ["demo-1"]  # states of finished runs are removed
    shutil.rmtree(project / "states")
    assert run(project)[0] == []
    write_json(project / "results/mine.json", sweep.model_copy(update={"runs": (demo, other)}).model_dump())
    assert run(project)[0] == ["demo-1", "tuned", "part"]  # the weights to start from are trained again
    assert run(project, "training.beta1=0.5")[0] == names  # another recipe is another sweep


@pytest.mark.parametrize(("corpus", "source"), [("docstrings", "tiny"), ("files", "corpus")])
def test_a_stopped_sweep_resumes(project, monkeypatch, corpus, source):
    """Whatever the corpus: the names of documents of own text are paths, such as corpus/a.txt:3."""
    if corpus == "files":
        use_own_text(project)
    train, calls = sweep_runs.train, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Busy("stopped")
        return train(*arguments)

    monkeypatch.setattr(sweep_runs, "train", stop_at_the_second)
    with pytest.raises(Busy, match=r"demo-2 was stopped.*experiment run mine"):
        run(project)
    names, sweep = run(project)
    assert names == ["demo-2", "tuned", "part"]
    assert [one.name for one in sweep.runs] == ["demo-1", *names]
    assert (sweep.corpus["corpus"], sweep.documents.sources) == (corpus, (source,) * 3)
    assert run(project)[0] == []


def test_an_unknown_source_is_refused(project):
    path = project / "conf/experiments/mine.yaml"
    path.write_text(SWEEP.replace("train_source: tiny", "train_source: numpy"))
    with pytest.raises(BadConfig, match="no document is from 'numpy'"):
        run(project)
