"""The Python API: five lines load a model, generate text and score texts, as the pipeline does."""

import inspect
import re
import textwrap

import pytest

import compactgpt
from compactgpt import api
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.config import Folder, Likelihood, load_params
from compactgpt.data.hub import check_model_folder
from compactgpt.evaluation import generation
from compactgpt.evaluation.likelihood import evaluate
from compactgpt.evaluation.totals import figures
from compactgpt.model.huggingface import save_hf
from compactgpt.model.weights import save_model
from tests.support.tiny_models import ROOT, TEXTS, save_params, save_split, save_tokenizer, tiny_gpt


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a model and its tokenizer, and nothing else, as the current folder."""
    folder = tmp_path / "project"
    encoding = save_tokenizer(folder / "data/tokenizer")
    save_model(tiny_gpt(encoding.n_vocab), folder / "models/compact")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(project):
    return compactgpt.load("models/compact")


@pytest.mark.parametrize("page", ["the docstring", "README.md"])
def test_the_five_lines_of_the_documentation_run(project, capsys, page):
    example = textwrap.dedent(inspect.getdoc(api).split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
    if page == "README.md":
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert example.startswith("import compactgpt\n")
    exec(example, {})
    *_, score = capsys.readouterr().out.splitlines()
    assert "nats per token, perplexity" in score


def test_the_same_seed_gives_the_same_text_also_with_more_samples(model):
    first = model.generate("the", max_new_tokens=30)
    assert first == model.generate("the", max_new_tokens=30)
    assert first != model.generate("the", max_new_tokens=30, seed=2)
    steps = model.stream("the", num_samples=3, max_new_tokens=30)
    samples = ["".join(texts) for texts in zip(*steps, strict=True)]
    assert samples[0] == first
    assert len(set(samples)) == 3
    greedy = model.generate("the cat", temperature=0)
    assert greedy == model.generate("the cat", top_k=1, seed=7) != first


def test_a_stream_has_no_half_characters(model, monkeypatch):
    text = "é漢\ufffd🙂x"
    tokens = model.encoding.encode_ordinary(text + "字")[:-1]  # the last character is not complete
    monkeypatch.setattr(generation, "generate_tokens", lambda *_: ([token] for token in tokens))
    pieces = [piece for (piece,) in model.stream("")]
    assert [piece for piece in pieces if piece] == ["é", "漢", "\ufffd🙂", "x"]


@pytest.mark.parametrize("documents", [TEXTS, TEXTS[:1]])
def test_a_score_is_what_the_pipeline_measures(model, tmp_path, documents):
    split = save_split(tmp_path / "val.tokens", model.encoding, documents)
    likelihood = Likelihood(window=8, batch_size=api.BATCH_SIZE, own_context=16, stride_share=0.25)
    totals = evaluate(model.language_model, split, model.encoding, likelihood)
    expected = figures(totals.nats, totals)
    found = model.score(documents if len(documents) > 1 else documents[0], window=8)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert getattr(found, name) == expected[name]["value"]
        if len(documents) > 1:
            assert found.intervals[name] == (expected[name]["low"], expected[name]["high"])
    assert (found.documents, found.bytes) == (len(documents), sum(len(text.encode()) for text in documents))
    assert bool(found.intervals) == (len(documents) > 1)  # one document has no variance


def test_the_window_fits_the_model_and_the_defaults_are_those_of_params_yaml(model):
    assert model.score("the cat " * 20).window == 16
    text = load_params(ROOT / "params.yaml").evaluation.text
    defaults = inspect.signature(model.stream).parameters
    for name in ("temperature", "top_k", "seed"):
        assert defaults[name].default == getattr(text, name)


def test_an_exported_model_needs_no_project(model, tmp_path, monkeypatch):
    save_hf(tiny_gpt(model.encoding.n_vocab), tmp_path / "hf", api.Path("data/tokenizer"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    exported = compactgpt.load(tmp_path / "hf")
    assert exported.generate("the cat", max_new_tokens=8) == model.generate("the cat", max_new_tokens=8)
    assert exported.score(TEXTS).loss == pytest.approx(model.score(TEXTS).loss, rel=1e-6)
    ours = compactgpt.load(tmp_path / "project/models/compact")  # its project has the tokenizer
    assert ours.score(TEXTS) == model.score(TEXTS)


def test_a_baseline_is_named_as_in_params_yaml(project, tmp_path):
    save_hf(tiny_gpt(263), project / "hf", project / "data/tokenizer")
    ours = {"kind": "folder", "path": "hf"}
    with pytest.raises(BadConfig) as refused:
        check_model_folder("ours", Folder(**ours))
    ours["sha256"] = re.search(r"is (\w{64})", str(refused.value))[1]
    save_params(project / "params.yaml", lambda tree: tree["baseline"]["specs"].update(ours=ours))
    save_split(project / "data/tokens/train.tokens", api.load_encoding(project / "data/tokenizer"))
    assert compactgpt.load("ours").generate("the") == compactgpt.load().generate("the")
    unigram = compactgpt.load("unigram")
    assert unigram.score("the cat").tokens == 5
    with pytest.raises(BadConfig, match="unigram can't generate text"):
        unigram.stream("the")  # before the first step
    with pytest.raises(MissingInput, match=r"no model 'gpt-2'.*\(gpt2, .*, ours, "):
        compactgpt.load("gpt-2")


@pytest.mark.parametrize(
    ("change", "call", "error", "message"),
    [
        ("", lambda: compactgpt.load("nix"), MissingInput, "no model 'nix': .*this file is missing"),
        ("", lambda: compactgpt.load("data"), MissingInput, "data has no model"),
        ("", lambda: compactgpt.load("models:/nix@champion"), MissingInput, r"no mlflow\.db here"),
        ("no tokenizer", lambda: compactgpt.load(), MissingInput, "no tokenizer in data/tokenizer"),
        ("other tokenizer", lambda: compactgpt.load(), BadData, "if another project trained the model"),
        ("", lambda: compactgpt.load().score(""), BadData, "empty"),
        ("", lambda: compactgpt.load().score("\ud800"), BadData, "UTF-8"),
        ("", lambda: compactgpt.load().generate("\ud800"), BadData, "UTF-8"),
        ("", lambda: compactgpt.load().generate("x", top_k=0), BadConfig, "must be at least 1"),
    ],
)
def test_a_mistake_is_a_user_error(project, monkeypatch, change, call, error, message):
    if change == "no tokenizer":
        (project / "data").rename(project / "old")
    elif change:
        save_model(tiny_gpt(99), project / "models/compact")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(error, match=message):
        call()
