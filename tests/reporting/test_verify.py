"""Whatever is altered is named: a digit of a report, a byte of data, weights or lock, a number of params."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import CheckFailed
from compactgpt.common.storage import atomic_folder, json_bytes
from compactgpt.config import load_params
from compactgpt.evaluation.likelihood import figures, read_totals
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import read_sweep
from compactgpt.reporting.html import render_files
from compactgpt.reporting.verify import (
    Verification,
    check_estimate,
    check_lock,
    check_manifests,
    check_numbers,
    check_renderings,
    differences,
)
from tests.support.comparison_inputs import PARAMS, ROOT, edit, make_place, run_comparison


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose reports fit their inputs, with the dvc.lock that DVC itself writes for it."""
    from dvc.repo import Repo

    place = make_place(tmp_path_factory.mktemp("place"))
    for name in ("src", "stages"):
        (place / name).unlink()
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copyfile(ROOT / ".dvcignore", place / ".dvcignore")
    shutil.rmtree(place / "models/compact")
    for folder in ("models/compact", "data/documents", "data/tokenizer", "data/tokens"):
        with atomic_folder(place / folder) as temporary:
            (temporary / "model.safetensors").write_bytes(bytes(range(256)))
    fill(place)
    params = load_params(place / "params.yaml")
    made = estimate(params, read_sweep(place / "results/ladder.json"))
    (place / "reports/estimate.json").write_bytes(json_bytes(made))
    for report, sums in reports_of(place).items():
        made = figures((totals := read_totals(sums)).nats, totals, params.evaluation.likelihood)
        edit(report, lambda r, made=made: r.update(made))
        edit(report, lambda r: r.get("tasks", {}).pop("cloze", None))
    with contextlib.chdir(place):
        done = run_comparison(place)
        assert done.exit_code == 0, done.output
        Repo.init(no_scm=True).commit(force=True)
    return place


def fill(place: Path) -> None:
    """Bring what dvc.yaml names and the place lacks: deps from this repository, outs as empty JSON."""
    stages = YAML(typ="safe").load(place / "dvc.yaml")["stages"].values()
    deps = {dep for body in stages for dep in body["deps"]}
    outs = {
        path
        for body in stages
        for kind in ("outs", "metrics", "plots")
        for out in body.get(kind, ())
        for path in (out if isinstance(out, dict) else [out])
    }
    for path in sorted(deps | outs):
        target = place / path
        if "{" in path or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in outs:
            target.write_text("{}\n")
        elif (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, target)
        else:
            shutil.copyfile(ROOT / path, target)


def reports_of(place: Path) -> dict[Path, Path]:
    found = {place / "reports/evaluation.json": place / "data/evaluation/compact.parquet"}
    for name in PARAMS.baseline.names:
        found[place / f"reports/baseline/{name}.json"] = place / f"data/baseline/{name}.parquet"
    return found


def look(place: Path, *checks) -> Verification:
    found = Verification()
    for check in checks:
        check(place, load_params(place / "params.yaml"), found)
    return found


class Altered:
    """A file with some bytes replaced, for the length of a block."""

    def __init__(self, path: Path, *flips: tuple[int, bytes]) -> None:
        self.path, self.before, content = path, path.read_bytes(), bytearray(path.read_bytes())
        for place, new in flips:
            content[place : place + len(new)] = new
        self.after = bytes(content)

    def __enter__(self):
        self.path.write_bytes(self.after)

    def __exit__(self, *_):
        self.path.write_bytes(self.before)


def at(path: Path, text: str, digit: int = 0) -> int:
    """The place of the `digit`th digit behind `text`."""
    content = path.read_bytes()
    place = content.index(text.encode()) + len(text.encode())
    return [n for n in range(place, len(content)) if 48 <= content[n] < 58][digit]


def other_digit(content: bytes, place: int) -> tuple[int, bytes]:
    return place, b"%d" % ((content[place] - 48 + 5) % 10)


def test_what_fits_is_not_accused(repository):
    found = look(repository, check_lock, check_manifests, check_estimate, check_numbers)
    assert found.differences == []
    assert found.unchecked == []
    assert found.checked["files, parameters and commands"] > 50
    assert found.checked["reports of models"] == 6


def test_any_digit_of_any_report_is_found(repository):
    """In each round one digit of every report, drawn by a fixed seed; test_tampering.py has the thousand."""
    dice, reports = random.Random(6), sorted(p for p in (repository / "reports").rglob("*") if p.is_file())
    texts = [path for path in reports if path.suffix in (".json", ".md", ".csv", ".html")]
    digits = {path: [n for n, b in enumerate(path.read_bytes()) if 48 <= b < 58] for path in texts}
    drawn = {path: dice.sample(places, min(5, len(places))) for path, places in digits.items() if places}
    assert sum(map(len, drawn.values())) > 80
    for turn in range(5):
        altered = {path: places[turn] for path, places in drawn.items() if turn < len(places)}
        before = {path: path.read_bytes() for path in altered}
        for path, place in altered.items():
            number, digit = other_digit(before[path], place)
            path.write_bytes(before[path][:number] + digit + before[path][number + 1 :])
        told = "\n".join(look(repository, check_lock).differences)
        for path, content in before.items():
            path.write_bytes(content)
            name = path.relative_to(repository).as_posix()
            folder = name.rpartition("/")[0] if "baseline" in name else name
            assert f"{name} is not what" in told or f"{folder} is not what" in told, name


def test_any_byte_of_data_weights_code_and_lock_is_found(repository):
    dice = random.Random(7)
    names = [
        "data/documents/model.safetensors",
        "data/tokens/manifest.json",
        "models/compact/model.safetensors",
        "data/evaluation/compact.parquet",
        "claims.yaml",
        "src/compactgpt/evaluation/metrics.py",
        "reports/loss.png",
    ]
    changed = []
    for name in names:
        path = repository / name
        place = dice.randrange(path.stat().st_size)
        changed.append(Altered(path, (place, bytes([path.read_bytes()[place] ^ 1]))))
    for one in changed:
        one.__enter__()
    told = "\n".join(look(repository, check_lock).differences)
    for one in changed:
        one.__exit__()
    for name in names:
        assert any(part in told for part in (name, f"{name.rpartition('/')[0]} is not")), name


def test_the_file_inside_a_folder_is_named_from_dvcs_own_listing(repository):
    with Altered(repository / "models/compact/model.safetensors", (9, b"?")):
        found = look(repository, check_lock, check_manifests)
    assert any(line.startswith("models/compact/model.safetensors is not what") for line in found.differences)
    assert any("model.safetensors was altered: its SHA-256" in line for line in found.differences)


def test_another_number_in_params_is_named(repository):
    path = repository / "params.yaml"
    with Altered(path, (at(path, "max_steps: "), b"9")):
        told = "\n".join(look(repository, check_lock, check_estimate).differences)
    assert "training: training is not that of params.yaml" in told
    assert "reports/estimate.json: compact." in told


@pytest.mark.parametrize(
    ("name", "before", "cell"),
    [
        ("evaluation.json", '"loss": {"value": ', "loss.value is "),
        ("evaluation.json", '"low": ', ".low is "),
        ("baseline/xz.json", '"perplexity": {"value": ', "perplexity.value is "),
    ],
)
def test_a_figure_is_made_anew_from_its_sums(repository, name, before, cell):
    """Were the lock altered too, the cell would still be found."""
    path = repository / "reports" / name
    with Altered(path, other_digit(path.read_bytes(), at(path, before, 5))):
        told = look(repository, check_numbers).differences
    assert len(told) == 1
    assert told[0].startswith(f"reports/{name}: ")
    assert cell in told[0]


@pytest.fixture(scope="module")
def files(repository):
    """What is made anew of the repository's record, drawn once for two tests, and what differs from it."""
    drawn = {}

    def kept(record, language):
        assert record == json.loads((repository / "reports/evidence.json").read_text())
        drawn.update(render_files(record, language))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compactgpt.reporting.verify.render_files", kept)
        assert look(repository, check_renderings).differences == []
    return drawn


def test_the_door_writes_all_renderings_of_one_record_and_shows_it(repository, files, tmp_path, monkeypatch):
    for name, content in files.items():
        assert (repository / "reports" / name).read_bytes() == content
        assert b"Software" not in content  # of PNG: the library's version
    listed = YAML(typ="safe").load(repository / "dvc.yaml")["stages"]["comparison"]["outs"]
    assert {f"reports/{name}" for name in files} == {path for out in listed for path in out}
    monkeypatch.chdir(repository)
    shutil.move(repository / "data", tmp_path / "data")
    shown = run_comparison(repository, "--show")
    shutil.move(tmp_path / "data", repository / "data")
    assert shown.exit_code == 0
    assert "655,360,000" in shown.output


def test_a_cell_of_a_rendering_is_named(repository, files, monkeypatch):
    monkeypatch.setattr("compactgpt.reporting.verify.render_files", lambda *_: files)
    reports = repository / "reports"
    places = {
        "evidence.json": at(reports / "evidence.json", '"id": "xz.loss"', 30),
        "comparison.md": at(reports / "comparison.md", "| xz |", 3),
        "comparison.csv": at(reports / "comparison.csv", "measured,xz,loss,,,,xz.loss,", 4),
        "index.html": at(reports / "index.html", 'data-id="xz.loss">', 2),
        "model_card.md": at(reports / "model_card.md", "| xz |", 3),
        "ratio.png": 900,
    }
    changed = [
        Altered(reports / name, (place, bytes([(reports / name).read_bytes()[place] ^ 1])))
        for name, place in places.items()
    ]
    for one in changed:
        one.__enter__()
    told = "\n".join(look(repository, check_renderings).differences)
    for one in changed:
        one.__exit__()
    assert "reports/evidence.json: evidence[xz.loss]." in told
    assert "reports/comparison.csv: line" in told
    assert "reports/index.html: line" in told
    assert "the inputs give" in told
    for name in places:
        assert f"reports/{name}: " in told


def test_without_the_data_it_says_what_it_could_not_check(repository, tmp_path):
    for folder in ("data", "models", ".dvc/cache"):
        shutil.move(repository / folder, tmp_path / Path(folder).name)
    try:
        found = look(repository, check_lock, check_manifests, check_numbers)
    finally:
        for folder in ("data", "models", ".dvc/cache"):
            shutil.move(tmp_path / Path(folder).name, repository / folder)
    assert found.differences == []
    assert {"data/tokens", "models/compact", "data/evaluation/compact.parquet"} <= set(found.unchecked)


def test_the_command_names_what_differs_and_fails(repository, files, monkeypatch):
    def made(record, _language):
        return files | {"evidence.json": json_bytes(record)}

    monkeypatch.setattr("compactgpt.reporting.verify.render_files", made)  # drawing takes seconds
    monkeypatch.chdir(repository)
    with Altered(
        repository / "reports/training.json", (at(repository / "reports/training.json", ": "), b"5")
    ):
        done = CliRunner().invoke(app, ["verify"])
        as_json = CliRunner().invoke(app, ["verify", "--json"])
    assert done.exit_code == as_json.exit_code == CheckFailed.exit_code == 3
    assert len(json.loads(as_json.stdout)["differences"]) == done.output.count("differs: ")
    assert "differs: reports/training.json is not what dvc.lock has (modified)" in done.output
    assert "evidence[compact.tokens_seen].value is 409600, but the inputs give 509600" in done.output


def test_differences_name_the_leaf():
    made = {"a": [{"id": "x", "v": 1.0}, {"id": "y", "v": 2}], "b": 1}
    assert list(differences(made, json.loads(json_bytes(made)))) == []
    told = list(differences(made, {"a": [{"id": "x", "v": 1.0}, {"id": "y", "v": 3}], "c": 1}))
    assert told == [
        "a[y].v is 3, but the inputs give 2",
        "b is missing",
        "c does not belong there",
    ]
    assert list(differences({"b": 1}, {"b": 1, "c": 2}, partial=True)) == []


def test_a_readme_that_quotes_the_tables_of_another_run_is_a_note(repository, files, monkeypatch):
    monkeypatch.setattr("compactgpt.reporting.verify.render_files", lambda *_: files)
    monkeypatch.setattr("compactgpt.reporting.verify.check_lock", lambda *_: None)  # a README is in no lock
    monkeypatch.chdir(repository)
    readme = repository / "README.md"
    readme.write_text("<!-- table note -->\nof another run\n<!-- end -->\n")
    done = CliRunner().invoke(app, ["verify"])
    readme.unlink()
    assert done.exit_code == 0, done.output
    assert "note: README.md quotes the tables of another run: `make readme` replaces them" in done.output
