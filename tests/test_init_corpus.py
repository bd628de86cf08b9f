"""`compactgpt init-corpus` proposes values with which the pipeline accepts the user's own text."""

import gzip
import importlib
import json
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from compactgpt import init_corpus
from compactgpt.cli import app
from compactgpt.common.console import silent
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import read_json
from compactgpt.config import load_params
from compactgpt.data.inspection import inspect
from compactgpt.data.sources import Limits, collect
from compactgpt.data.text_files import file_corpus, list_files
from compactgpt.data.tokenization import tokenize
from compactgpt.data.validation import validate
from compactgpt.tracking.dvc_files import ignored_files
from tests.support.data_docs import compiled_once  # noqa: F401
from tests.support.tiny_corpus import EOT, make_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
SECONDS_OF_STEP = 0.25
WORDS = [f"word{n}" for n in range(3000)]
PARAMS = Path("params.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with the shipped params.yaml; `dvc add` only copies."""
    folder = tmp_path / "project"
    (folder / "corpus").mkdir(parents=True)
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    shutil.copytree(ROOT / "conf", folder / "conf")
    monkeypatch.chdir(folder)

    def add(words):
        source, target = Path(words[2]), Path(words[4])
        assert ("-f" in words) == target.exists()  # replaces the text of an earlier `dvc add`
        (partial(shutil.copytree, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile)(source, target)
        Path(f"{target}.dvc").write_text("")

    monkeypatch.setattr(init_corpus, "run_dvc", add)
    monkeypatch.setattr(init_corpus, "require_repository", lambda root: None)
    # The speed at which a step of the demo takes so long.
    params = load_params(PARAMS)
    minutes = init_corpus.training_minutes(params, 1.0) / params.training.max_steps
    monkeypatch.setattr(init_corpus, "measure_speed", lambda params: minutes * 60 / SECONDS_OF_STEP)
    return folder


def speeches(count):
    """One file: short speeches, many of them equal, as in tiny Shakespeare."""
    generator = random.Random(1)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(3, 60))) for _ in range(count)]
    lines[::9] = ["Ay, my lord."] * len(lines[::9])
    return "\n\n".join(f"PERSON {n % 7}:\n{line}" for n, line in enumerate(lines))


def rows(count, words):
    generator = random.Random(2)
    texts = [" ".join(generator.choices(WORDS, k=words)) for _ in range(count)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


CHINESE = [chr(0x4E00 + n) for n in range(1000)]
STORY = speeches(300)
KINDS = {
    "a play": {"play.txt": speeches(6000)},
    "a short story": {"story.md": STORY},
    "rows": {"rows.jsonl": rows(2000, 80)},
    "short rows": {"rows.jsonl": rows(2000, 5)},
    "Chinese notes": {f"notes/{n}.txt": "".join(random.Random(n).choices(CHINESE, k=450)) for n in range(40)},
}


def write(place, files):
    """Write files outside of corpus/, as a user has them; return the file or folder."""
    for name, text in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(text.encode(errors="surrogateescape"))
    return place / Path(name).parts[0]


def run(*words, exit_code=0):
    done = CliRunner().invoke(app, ["init-corpus", *map(str, words)])
    assert done.exit_code == exit_code, done.output
    return done.output


@pytest.mark.parametrize(
    ("kind", "split", "val_documents"),
    [
        ("a play", "tail", 20),
        ("a short story", "tail", 10),
        ("rows", "hash", 20),
        ("short rows", "hash", 20),
        ("Chinese notes", "tail", 4),
    ],
)
def test_the_data_stages_accept_the_text_with_the_proposed_values(
    project, tmp_path, kind, split, val_documents
):
    path = write(tmp_path, KINDS[kind])
    run(path, "--yes")
    params = load_params(PARAMS)
    assert params.download.files.patterns == (f"corpus/{path.name}{'/**' if path.is_dir() else ''}",)
    assert params.tokenization.split == split
    state, tokenizer = Path("state"), make_tokenizer(tmp_path / "tokenizer")
    corpus = file_corpus(params.download, project, silent, lambda message: None, ignored_files(project))
    collect(corpus, Path("documents"), Limits(10**8), state=state, log=lambda message: None)
    report = validate(Path("documents"), Path("docs"), params.validation)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    settings = params.tokenization
    facts = tokenize(Path("documents"), tokenizer, Path("tokens"), settings, num_workers=1, state=state)
    report = inspect(Path("documents"), Path("tokens"), Path("docs"), params.inspection, num_workers=1)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    assert facts["val"]["documents"] >= val_documents
    # Four epochs at most, since an hour would repeat so little text hundreds of times.
    tokens = params.training.max_steps * params.training.tokens_per_step
    assert tokens < 6 * sum(report[split]["bytes"] for split in ("train", "val"))


@pytest.mark.parametrize("kind", ["a short story", "short rows"])
def test_training_and_evaluation_run_with_the_proposed_values(project, tmp_path, kind):
    run(write(tmp_path, KINDS[kind]), "--yes", "--minutes", 0.01)
    tree, tokenizer = read_yaml(PARAMS), make_tokenizer(Path("data/tokenizer"))
    tree["model"].update(n_layer=1, n_head=2, n_embd=16, vocab_size=EOT + 1, padded_vocab_size=272)
    tree["runtime"].update(device="cpu", num_threads=1)
    PARAMS.write_text(json.dumps(tree))  # JSON is YAML
    params, state = load_params(PARAMS), Path("state")
    corpus = file_corpus(params.download, project, silent, lambda message: None, ignored_files(project))
    collect(corpus, Path("documents"), Limits(10**8), state=state, log=lambda message: None)
    facts = tokenize(
        Path("documents"), tokenizer, Path("data/tokens"), params.tokenization, num_workers=1, state=state
    )
    for stage, *words in (["training"], ["evaluation"], ["baseline", "unigram"]):
        script = importlib.import_module(f"stages.{stage}")
        done = CliRunner().invoke(script.app, [*words, "--tracker", "none"])
        assert done.exit_code == 0, done.output
    for name in ("evaluation", "baseline/unigram"):
        report = read_json(Path(f"reports/{name}.json"))
        assert report["validation"]["documents"] == facts["val"]["documents"]


def test_the_time_is_as_asked_and_intervals_fit_it(project, tmp_path):
    before = PARAMS.read_text().splitlines()
    output = run(write(tmp_path, KINDS["rows"]), "--minutes", 2, "-y")
    training = load_params(PARAMS).training
    assert training.max_steps == 2 * 60 / SECONDS_OF_STEP
    assert 0 < training.warmup_steps < training.eval_interval < training.checkpoint_interval < 480
    after = PARAMS.read_text().splitlines()
    assert len(after) == len(before)
    changed = [line for line in after if line not in before]
    assert len(changed) == len([line for line in output.splitlines() if " -> " in line])


def test_no_value_of_an_earlier_corpus_stays(project, tmp_path):
    found = []
    for kind in ("rows", "Chinese notes", "rows"):
        run(write(tmp_path, KINDS[kind]), "--yes")
        found.append(load_params(PARAMS))
    assert found[0] == found[2] != found[1]


def test_without_a_terminal_and_without_yes_nothing_is_changed(project, tmp_path):
    before = PARAMS.read_bytes()
    output = run(write(tmp_path, KINDS["rows"]))
    assert "found 2,000 documents\n" in output
    assert "training alone: " in output
    assert "download.corpus: 'docstrings' -> 'files'" in output
    assert output.endswith("nothing was changed; next: the same command with --yes\n")
    assert PARAMS.read_bytes() == before
    assert [*Path("corpus").iterdir()] == []


@pytest.mark.parametrize("answer", ["y", "n"])
def test_on_a_terminal_the_values_are_applied_only_after_yes(project, tmp_path, monkeypatch, capsys, answer):
    path, before = write(tmp_path, KINDS["rows"]), PARAMS.read_bytes()
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    with open(terminal) as stdin, open(keyboard):
        monkeypatch.setattr(sys, "stdin", stdin)
        get_command(app)(["init-corpus", str(path)], standalone_mode=False)
    output = capsys.readouterr().out
    assert "Apply these values? [y/N]: " in output
    is_applied = answer == "y"
    assert (PARAMS.read_bytes() != before) == Path("corpus/rows.jsonl").exists() == is_applied
    assert ("next: make repro\n" in output) == ("nothing was changed" not in output) == is_applied


@pytest.mark.parametrize(
    ("name", "target"),
    [("mein Täxt 😀.txt", "mein Täxt 😀.txt"), ("enwik8", "enwik8.txt"), ("b.gz", "b.txt.gz")],
)
def test_text_is_copied_to_corpus_with_a_suffix_that_is_read(project, tmp_path, name, target):
    (tmp_path / name).write_bytes(gzip.compress(STORY.encode()) if name.endswith(".gz") else STORY.encode())
    for _ in range(2):
        run(f"../{name}", "--yes")
        patterns = load_params(PARAMS).download.files.patterns
        assert list_files(patterns, project, ignored_files(project)) == [(0, f"corpus/{target}")]


def test_text_in_corpus_stays_where_it_is(project):
    write(project, {"corpus/a.txt": speeches(2000), "corpus/README.md": "# The project's own page"})
    output = run("corpus", "--yes")
    assert "dvc add" not in output
    assert "README" not in output
    files = load_params(PARAMS).download.files
    assert (files.patterns, files.name) == (("corpus/**",), None)


def test_text_that_dvc_will_ignore_in_corpus_is_not_counted(project, tmp_path):
    Path(".dvcignore").write_text("corpus/notes/drafts/\n")
    lines = speeches(2000).splitlines(keepends=True)
    write(tmp_path, {"notes/a.txt": "".join(lines[:2000]), "notes/drafts/b.txt": "".join(lines[2000:])})
    outside = run(tmp_path / "notes", "--yes")
    write(project, {"corpus/notes/drafts/b.txt": "".join(lines[2000:])})
    assert run("corpus/notes").split("held out")[0] == outside.split("held out")[0]
    Path(".dvcignore").unlink()
    assert run("corpus/notes").split("held out")[0] != outside.split("held out")[0]


def test_a_corpus_longer_than_the_sample_is_extrapolated(project, tmp_path, monkeypatch):
    files, download = [(tmp_path, "rows.jsonl")], load_params(PARAMS).download
    write(tmp_path, KINDS["rows"])
    whole = init_corpus.read_sample(files, download)
    monkeypatch.setattr(init_corpus, "SAMPLE_BYTES", whole.bytes // 4)
    part = init_corpus.read_sample(files, download)
    assert len(part.rows) < len(whole.rows) / 3
    assert part.scale * len(part.rows) == pytest.approx(len(whole.rows), rel=0.1)


@pytest.mark.parametrize(
    ("files", "paths", "exit_code", "message"),
    [
        ({"one.txt": "Short."}, ["one.txt"], 65, "documents: found 1, but train and val need 10: add"),
        ({"b.txt": STORY, "project/corpus/b.txt": "x"}, ["b.txt"], 78, "corpus/b.txt exists already: rename"),
        ({"none/a.bin": ""}, ["none"], 66, "no file"),
        ({}, ["missing.txt"], 66, "missing.txt is missing: give a text file"),
        ({"a/b.txt": STORY, "b.txt": STORY}, ["a/b.txt", "b.txt"], 78, "would be the same file"),
        ({"a[1].txt": STORY}, ["a[1].txt"], 78, "rename corpus/a[1].txt"),
        ({"project/corpus/enwik8": STORY}, ["project/corpus/enwik8"], 78, "rename corpus/enwik8: "),
        ({}, ["project"], 78, "project contains the folder corpus/"),
        ({"a.txt": "\udcff"}, ["a.txt"], 65, "a.txt, line 1: byte 0xff is not UTF-8"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(project, tmp_path, files, paths, exit_code, message):
    before = PARAMS.read_bytes()
    if files:
        write(tmp_path, files)
    assert message in run(*(tmp_path / path for path in paths), "--yes", exit_code=exit_code)
    assert PARAMS.read_bytes() == before
