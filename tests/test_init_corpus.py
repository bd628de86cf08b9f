"""`compactgpt init-corpus` proposes values with which the pipeline accepts the user's own text."""

import json
import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import init_corpus
from compactgpt.cli import app
from compactgpt.common.console import silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput, UserError
from compactgpt.config import load_params
from compactgpt.data.inspection import inspect
from compactgpt.data.sources import Limits, collect
from compactgpt.data.text_files import file_corpus
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

    def add(words, environment):
        source, target = Path(words[2]), Path(words[4] if "-o" in words else words[2])
        if source.resolve() != target.resolve():
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
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


def write_text(place, kind):
    """Write text outside of corpus/, as a user has it, and return its path."""
    generator = random.Random(2)
    if kind == "a play":
        (place / "play.txt").write_text(speeches(6000))
        return place / "play.txt"
    if kind == "a short story":
        (place / "story.md").write_text(speeches(300))
        return place / "story.md"
    if kind == "rows":
        rows = [{"text": " ".join(generator.choices(WORDS, k=80))} for _ in range(2000)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place / "rows.jsonl"
    folder = place / "notes"
    folder.mkdir()
    for n in range(40):
        characters = (
            [chr(0x4E00 + k) for k in range(1000)]
            if kind == "Chinese notes"
            else [f"{k}, a " for k in range(1000)]
        )
        (folder / f"{n}.txt").write_text("".join(generator.choices(characters, k=450)))
    return folder


@pytest.mark.parametrize("kind", ["a play", "a short story", "rows", "Chinese notes", "notes of numbers"])
def test_the_data_stages_accept_the_text_with_the_proposed_values(project, tmp_path, kind):
    path = write_text(tmp_path, kind)
    done = CliRunner().invoke(app, ["init-corpus", str(path), "--yes"])
    assert done.exit_code == 0, done.output
    params = load_params(project / "params.yaml")
    assert params.download.files.patterns == (f"corpus/{path.name}{'/**' if path.is_dir() else ''}",)
    assert params.tokenization.split == ("hash" if kind == "rows" else "tail")
    corpus = file_corpus(params.download, project, silent, lambda message: None)
    collect(corpus, Path("documents"), Limits(10**8), state=Path("state"), log=lambda message: None)
    report = validate(Path("documents"), Path("docs"), params.validation)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    state = tmp_path / "state"
    facts = tokenize(
        Path("documents"), tokenizer, Path("tokens"), params.tokenization, num_workers=1, state=state
    )
    report = inspect(Path("documents"), Path("tokens"), Path("docs"), params.inspection, num_workers=1)
    assert report["success"], [each["advice"] for each in report["expectations"] if not each["success"]]
    assert facts["val"]["documents"] >= (4 if "notes" in kind else 20 if kind != "a short story" else 10)
    # Four epochs at most, since an hour would repeat so little text hundreds of times.
    tokens = params.training.max_steps * params.training.tokens_per_step
    assert tokens < 6 * sum(report[split]["bytes"] for split in ("train", "val"))


@pytest.mark.parametrize(
    ("options", "steps"), [([], None), (["--minutes", "2"], 480), (["--steps", "21"], 21)]
)
def test_the_time_or_the_steps_are_as_asked_and_intervals_fit_them(project, tmp_path, options, steps):
    path = write_text(tmp_path, "rows")
    before = (project / "params.yaml").read_text().splitlines()
    done = CliRunner().invoke(app, ["init-corpus", str(path), *options, "-y"])
    assert done.exit_code == 0, done.output
    training = load_params(project / "params.yaml").training
    assert steps is None or training.max_steps == steps
    assert (
        0 < training.warmup_steps < training.eval_interval < training.checkpoint_interval < training.max_steps
    )
    after = (project / "params.yaml").read_text().splitlines()
    changed = [line for line in after if line not in before]
    assert len(after) == len(before)
    assert len(changed) == len([line for line in done.output.splitlines() if " -> " in line])


def test_a_second_corpus_has_no_limits_of_the_first(project, tmp_path):
    rows, notes = write_text(tmp_path, "rows"), write_text(tmp_path, "Chinese notes")
    found = []
    for paths in ([rows], [notes], [rows]):
        plan = init_corpus.plan_corpus(paths, Path("params.yaml"))
        init_corpus.apply_plan(plan, Path("params.yaml"))
        found.append(plan.content)
    assert found[0] == found[2] != found[1]


def test_an_experiment_takes_a_corpus(project, tmp_path):
    path = str(write_text(tmp_path, "rows"))
    done = CliRunner().invoke(app, ["experiment", "apply", "context-1024", "--corpus", path])
    assert done.exit_code == 0, done.output
    params = load_params(Path("params.yaml"))
    assert (params.model.block_size, params.download.files.patterns) == (1024, ("corpus/rows.jsonl",))


def test_without_a_terminal_and_without_yes_nothing_is_changed(project, tmp_path):
    before = (project / "params.yaml").read_bytes()
    done = CliRunner().invoke(app, ["init-corpus", str(write_text(tmp_path, "rows"))])
    assert done.exit_code == 0, done.output
    assert "found 2,000 documents\n" in done.output
    assert "download.corpus: 'docstrings' -> 'files'" in done.output
    assert done.output.endswith("nothing was changed; next: the same command with --yes\n")
    assert (project / "params.yaml").read_bytes() == before
    assert [*(project / "corpus").iterdir()] == []


def test_text_in_corpus_is_added_where_it_is_and_again_after_a_change(project):
    (project / "corpus/a.txt").write_text(speeches(2000))
    (project / "corpus/README.md").write_text("# The project's own page")
    plan = init_corpus.plan_corpus([Path("corpus")], Path("params.yaml"))
    assert plan.additions == [("corpus/a.txt",)]
    init_corpus.apply_plan(plan, Path("params.yaml"))
    assert load_params(Path("params.yaml")).download.files.patterns == ("corpus/**",)
    assert init_corpus.plan_corpus([Path("corpus/a.txt")], Path("params.yaml")).additions == []
    Path("../a.txt").write_text(speeches(2000))
    again = init_corpus.plan_corpus([Path("../a.txt")], Path("params.yaml"))
    assert again.additions == [(str(Path("../a.txt").absolute()), "-o", "corpus/a.txt", "-f")]


def test_a_corpus_longer_than_the_sample_is_extrapolated(project, tmp_path, monkeypatch):
    path = write_text(tmp_path, "rows")
    whole, _ = init_corpus.choose_cutting(
        [init_corpus.find_place(path, project)], load_params(Path("params.yaml")).download
    )
    monkeypatch.setattr(init_corpus, "SAMPLE_BYTES", whole.bytes // 4)
    part, _ = init_corpus.choose_cutting(
        [init_corpus.find_place(path, project)], load_params(Path("params.yaml")).download
    )
    assert len(part.rows) < len(whole.rows) / 3
    assert part.scale * len(part.rows) == pytest.approx(len(whole.rows), rel=0.1)


def write_one(place):
    (place / "one.txt").write_text("One short document.")
    return [place / "one.txt"]


def write_same(place):
    paths = [place / name / "same.txt" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(speeches(300))
    return paths


def write_other(place):
    (place / "project/corpus/one.txt").write_text("Another text of the same name.")
    return write_one(place)


def write_none(place):
    (place / "none").mkdir()
    return [place / "none"]


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (write_one, BadData, "found 1 document, but train and val need one each"),
        (write_same, BadConfig, "two of the paths would be the same file in corpus/"),
        (write_other, BadConfig, "corpus/one.txt exists already: rename it, or run `compactgpt init-corpus"),
        (write_none, MissingInput, "no file"),
        (lambda place: [place / "missing.txt"], MissingInput, "missing.txt is missing: give a text file"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(project, tmp_path, write, error, message):
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        init_corpus.plan_corpus(write(tmp_path), Path("params.yaml"))
    assert type(caught.value) is error
    assert (project / "params.yaml").read_bytes() == before
