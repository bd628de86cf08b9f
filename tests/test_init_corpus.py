"""`compactgpt init-corpus` proposes values with which the pipeline accepts the user's own text."""

import gzip
import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import init_corpus
from compactgpt.cli import app
from compactgpt.common.console import silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput
from compactgpt.config import load_params
from compactgpt.data.inspection import inspect
from compactgpt.data.sources import Limits, collect
from compactgpt.data.text_files import file_corpus, list_files
from compactgpt.data.tokenization import tokenize
from compactgpt.data.validation import validate
from tests.support.data_docs import compiled_once  # noqa: F401
from tests.support.tiny_corpus import make_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
SECONDS_OF_STEP = 0.25
WORDS = [f"word{n}" for n in range(3000)]


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
        (partial(shutil.copytree, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile)(source, target)
        Path(f"{target}.dvc").write_text("")

    monkeypatch.setattr(init_corpus, "run_dvc", add)
    monkeypatch.setattr(init_corpus, "require_repository", lambda root: None)
    # The speed at which a step of the demo takes so long.
    params = load_params(Path("params.yaml"))
    minutes = init_corpus.training_minutes(params, 1.0) / params.training.max_steps
    monkeypatch.setattr(init_corpus, "measure_flops", lambda: minutes * 60 / SECONDS_OF_STEP)
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


def notes(characters):
    generator = random.Random(2)
    return {f"notes/{n}.txt": "".join(generator.choices(characters, k=450)) for n in range(40)}


KINDS = {
    "a play": {"play.txt": speeches(6000)},
    "a short story": {"story.md": speeches(300)},
    "rows": {"rows.jsonl": rows(2000, 80)},
    "short rows": {"rows.jsonl": rows(2000, 5)},
    "Chinese notes": notes([chr(0x4E00 + n) for n in range(1000)]),
}


def write(place, files):
    """Write files outside of corpus/, as a user has them; return the file or folder."""
    for name, text in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(text.encode(errors="surrogateescape"))
    return place / Path(name).parts[0]


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def propose(*paths):
    return init_corpus.plan_corpus([Path(path) for path in paths], Path("params.yaml"))


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
    run("init-corpus", path, "--yes")
    params = load_params(Path("params.yaml"))
    assert params.download.files.patterns == (f"corpus/{path.name}{'/**' if path.is_dir() else ''}",)
    assert params.tokenization.split == split
    corpus = file_corpus(params.download, project, silent, lambda message: None)
    collect(corpus, Path("documents"), Limits(10**8), state=Path("state"), log=lambda message: None)
    report = validate(Path("documents"), Path("docs"), params.validation)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    facts = tokenize(
        Path("documents"),
        tokenizer,
        Path("tokens"),
        params.tokenization,
        num_workers=1,
        state=Path("state"),
    )
    report = inspect(Path("documents"), Path("tokens"), Path("docs"), params.inspection, num_workers=1)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    assert facts["val"]["documents"] >= val_documents
    # Four epochs at most, since an hour would repeat so little text hundreds of times.
    tokens = params.training.max_steps * params.training.tokens_per_step
    assert tokens < 6 * sum(report[split]["bytes"] for split in ("train", "val"))


@pytest.mark.parametrize(
    ("options", "steps"), [([], None), (["--minutes", "2"], 480), (["--steps", "21"], 21)]
)
def test_the_time_or_the_steps_are_as_asked_and_intervals_fit_them(project, tmp_path, options, steps):
    before = Path("params.yaml").read_text().splitlines()
    output = run("init-corpus", write(tmp_path, KINDS["rows"]), *options, "-y")
    training = load_params(Path("params.yaml")).training
    assert steps is None or training.max_steps == steps
    assert (
        0 < training.warmup_steps < training.eval_interval < training.checkpoint_interval < training.max_steps
    )
    after = Path("params.yaml").read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert len(after) == len(before)
    assert len(changed) == len([line for line in output.splitlines() if " -> " in line])


def test_no_value_of_an_earlier_corpus_stays(project, tmp_path):
    found = []
    for kind in ("rows", "Chinese notes", "rows"):
        run("init-corpus", write(tmp_path, KINDS[kind]), "--yes")
        found.append(load_params(Path("params.yaml")))
    assert found[0] == found[2] != found[1]


def test_an_experiment_takes_a_corpus(project, tmp_path):
    path = write(tmp_path, KINDS["rows"])
    run("experiment", "apply", "context-1024", "--corpus", path, "-S", "download.max_bytes=1000")
    params = load_params(Path("params.yaml"))
    assert (params.model.block_size, params.download.files.patterns) == (1024, ("corpus/rows.jsonl",))
    assert params.download.max_bytes is None


def test_without_a_terminal_and_without_yes_nothing_is_changed(project, tmp_path):
    before = Path("params.yaml").read_bytes()
    output = run("init-corpus", write(tmp_path, KINDS["rows"]))
    assert "found 2,000 documents\n" in output
    assert "training alone: " in output
    assert "download.corpus: 'docstrings' -> 'files'" in output
    assert output.endswith("nothing was changed; next: the same command with --yes\n")
    assert Path("params.yaml").read_bytes() == before
    assert [*Path("corpus").iterdir()] == []


@pytest.mark.parametrize(
    ("name", "target"),
    [("mein Täxt 😀.txt", "mein Täxt 😀.txt"), ("enwik8", "enwik8.txt"), ("b.gz", "b.txt.gz")],
)
def test_text_is_copied_to_corpus_with_a_suffix_that_is_read(project, tmp_path, name, target):
    text = speeches(300).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (tmp_path / "project/link").symlink_to(tmp_path)
    plan = propose(Path("corpus/../link", name))
    init_corpus.apply_plan(plan, Path("params.yaml"))
    assert list_files(load_params(Path("params.yaml")).download.files.patterns, project) == [
        (0, f"corpus/{target}")
    ]
    (again,) = propose(tmp_path / name).additions  # `dvc add` replaces the text of the earlier one
    assert again == [str(tmp_path / name), "-o", f"corpus/{target}", "-f"]


def test_text_in_corpus_stays_where_it_is(project):
    write(project, {"corpus/a.txt": speeches(2000), "corpus/README.md": "# The project's own page"})
    plan = propose("corpus")
    assert plan.additions == []
    assert "README" not in "".join(plan.found)
    init_corpus.apply_plan(plan, Path("params.yaml"))
    files = load_params(Path("params.yaml")).download.files
    assert (files.patterns, files.name) == (("corpus/**",), None)
    assert propose("corpus/a.txt").additions == []


def test_a_corpus_longer_than_the_sample_is_extrapolated(project, tmp_path, monkeypatch):
    files, download = [(tmp_path, "rows.jsonl")], load_params(Path("params.yaml")).download
    write(tmp_path, KINDS["rows"])
    whole = init_corpus.read_sample(files, download)
    monkeypatch.setattr(init_corpus, "SAMPLE_BYTES", whole.bytes // 4)
    part = init_corpus.read_sample(files, download)
    assert len(part.rows) < len(whole.rows) / 3
    assert part.scale * len(part.rows) == pytest.approx(len(whole.rows), rel=0.1)


STORY = speeches(300)


@pytest.mark.parametrize(
    ("files", "paths", "error", "message"),
    [
        ({"one.txt": "Short."}, ["one.txt"], BadData, "documents: found 1, but train and val need 10: add"),
        ({"a/b.txt": STORY, "b.txt": STORY}, ["a/b.txt", "b.txt"], BadConfig, "would be the same file"),
        (
            {"b.txt": STORY, "project/corpus/b.txt": "Another."},
            ["b.txt"],
            BadConfig,
            "corpus/b.txt exists already: rename it, or run `compactgpt init-corpus corpus/b.txt`",
        ),
        ({"none/a.bin": ""}, ["none"], MissingInput, "no file"),
        ({}, ["missing.txt"], MissingInput, "missing.txt is missing: give a text file"),
        ({"a[1].txt": STORY}, ["a[1].txt"], BadConfig, r"rename corpus/a\[1\].txt"),
        (
            {"project/corpus/enwik8": STORY},
            ["project/corpus/enwik8"],
            BadConfig,
            "rename corpus/enwik8, .* a suffix that is read",
        ),
        ({}, ["project"], BadConfig, "project contains the folder corpus/"),
        ({"a.pdf": "%PDF\0\udcff"}, ["a.pdf"], BadData, "a.pdf, line 1: byte 0xff is not UTF-8"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(project, tmp_path, files, paths, error, message):
    before = Path("params.yaml").read_bytes()
    if files:
        write(tmp_path, files)
    with pytest.raises(error, match=message):
        propose(*(tmp_path / path for path in paths))
    assert Path("params.yaml").read_bytes() == before
