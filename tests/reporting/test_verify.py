"""Whatever is altered is named: a byte of data, weights, code or lock, a number of a report or of params."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo  # here: its log keeps the stream of the first import
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import CheckFailed
from compactgpt.common.storage import atomic_folder, json_bytes, write_json
from compactgpt.config import load_params
from compactgpt.evaluation.totals import figures, read_totals
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import read_sweep
from compactgpt.reporting.pages import render_files
from compactgpt.reporting.verify import (
    Verification,
    check_estimate,
    check_lock,
    check_numbers,
    check_params,
    check_renderings,
    differences,
)
from compactgpt.tracking.dvc_files import params_sha256
from tests.support.comparison_inputs import PARAMS, ROOT, edit, make_place, run_comparison, write


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose reports fit their inputs, with the dvc.lock that DVC itself writes for it."""
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
    write_json(place / "reports/estimate.json", estimate(params, read_sweep(place / "results/ladder.json")))
    for report, sums in reports_of(place).items():
        totals, changed = read_totals(sums), json.loads(report.read_text())
        changed |= figures(totals.nats, totals)
        for view, nats in totals.views.items():
            changed["views"][view] |= figures(nats, totals)
        write(report, changed)
    with contextlib.chdir(place):
        done = run_comparison(place)
        assert done.exit_code == 0, done.output
        Repo.init(no_scm=True).commit(force=True)
    add_removed_stages(place)
    return place


def add_removed_stages(place: Path) -> None:
    """Add what DVC keeps of stages that dvc.yaml no longer has (treeverse/dvc#5293), and a report of one."""
    lock = YAML(typ="safe").load(place / "dvc.lock")
    stages = lock["stages"]
    stages["baseline@gone"] = json.loads(json.dumps(stages["baseline@xz"]).replace("xz", "gone"))
    stages["gone"] = {**stages["training"], "outs": [{"path": "reports/gone.json", "md5": "0" * 32}]}
    write_json(place / "dvc.lock", lock)  # JSON is YAML
    write_json(place / "reports/gone.json", {"params_sha256": "0" * 64})


def fill(place: Path) -> None:
    """Create what dvc.yaml names and the place lacks: deps from this repository, outs as empty JSON."""
    for body in YAML(typ="safe").load(place / "dvc.yaml")["stages"].values():
        outs = [out for kind in ("outs", "metrics", "plots") for out in body.get(kind, ())]
        paths = [path for out in outs for path in (out if isinstance(out, dict) else [out])]
        for path in body["deps"] + paths:
            source, target = ROOT / path, place / path
            if "{" in path or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in paths or not source.exists():
                target.write_text("{}\n")
            elif source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)


def reports_of(place: Path) -> dict[Path, Path]:
    found = {place / "reports/evaluation.json": place / "data/evaluation/compact.parquet"}
    for name in PARAMS.baseline.names:
        found[place / f"reports/baseline/{name}.json"] = place / f"data/baseline/{name}.parquet"
    return found


def run_checks(place: Path, *checks) -> Verification:
    found = Verification()
    for check in checks:
        check(place, load_params(place / "params.yaml"), found)
    return found


@contextlib.contextmanager
def altered(place: Path, bytes_: dict[str, int]):
    """Change one byte of each file, at these positions, for the length of a block; a digit stays one."""
    before = {place / name: (place / name).read_bytes() for name in bytes_}
    for (path, content), position in zip(before.items(), bytes_.values(), strict=True):
        times = path.stat()
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a damaged disk leaves them
    yield
    for path, content in before.items():
        path.write_bytes(content)


def digit_after(path: Path, text: str, number: int = 0) -> int:
    """Return the position of a digit after `text`: the first, or the one of this number."""
    content = path.read_bytes()
    start = content.index(text.encode()) + len(text)
    return [place for place in range(start, len(content)) if 48 <= content[place] < 58][number]


def test_nothing_differs_where_all_fits(repository):
    """Also not the stages that were removed."""
    found = run_checks(repository, check_lock, check_params, check_estimate, check_numbers)
    assert (found.differences, found.unchecked) == ([], [])
    assert found.checked["files, parameters and commands"] > 50
    assert found.checked["reports of models"] == len(reports_of(repository))


def test_each_altered_byte_is_found(repository):
    """tests/robustness/test_tampering.py changes data, weights and reports."""
    xz = "reports/baseline/xz.json"
    positions = {
        "claims.yaml": 100,
        "src/compactgpt/evaluation/metrics.py": 100,
        "reports/loss.png": 100,
        "params.yaml": digit_after(repository / "params.yaml", "max_steps: "),
        xz: digit_after(repository / xz, '"perplexity": {"value": ', 5),
    }
    with altered(repository, positions):
        found = run_checks(repository, check_lock, check_estimate, check_numbers).differences
    for start in (
        "claims.yaml is not what dvc.lock has",
        "src/compactgpt is not what dvc.lock has",  # the dependency that contains metrics.py
        "reports/loss.png is not what dvc.lock has",
        "dvc.lock: training: training differs from params.yaml: run `dvc repro`",
        "reports/estimate.json: compact.",
    ):
        assert any(line.startswith(start) for line in found), start
    (scores,) = (line for line in found if line.startswith(f"{xz}: "))  # computed from the losses by document
    assert scores.startswith(f"{xz}: perplexity.value is ")


def test_a_report_of_other_parameters_than_those_of_the_lock_is_found(repository):
    """As after `dvc commit -f`, which records the parameters of now for a report of before."""
    stages = YAML(typ="safe").load(repository / "dvc.lock")["stages"]
    path = repository / "reports/training.json"
    before, params = path.read_bytes(), stages["training"]["params"]["params.yaml"]
    for steps, found in ((params["training"]["max_steps"], 0), (90, 1)):
        params["training"]["max_steps"] = steps
        edit(path, lambda report: report.update(params_sha256=params_sha256(params)))
        assert len(run_checks(repository, check_params).differences) == found
    path.write_bytes(before)


@pytest.fixture(scope="module")
def renderings(repository):
    """The files of the repository's record, rendered once, after a check that nothing differs from them."""
    rendered = {}

    def keep(record, language):
        assert record == json.loads((repository / "reports/evidence.json").read_text())
        rendered.update(render_files(record, language))
        return rendered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compactgpt.reporting.verify.render_files", keep)
        assert run_checks(repository, check_renderings).differences == []
    return rendered


def test_the_comparison_writes_what_dvc_yaml_lists(repository, renderings):
    listed = YAML(typ="safe").load(repository / "dvc.yaml")["stages"]["comparison"]["outs"]
    assert {f"reports/{name}" for name in renderings} == {path for out in listed for path in out}
    assert not [name for name, content in renderings.items() if b"Software" in content]  # PNG: its library


def test_a_changed_rendering_is_named_with_its_cell_or_line(repository, renderings, monkeypatch):
    monkeypatch.setattr("compactgpt.reporting.verify.render_files", lambda *_: renderings)
    reports = repository / "reports"
    places = {
        "evidence.json": digit_after(reports / "evidence.json", '"id": "xz.loss"', 30),
        "comparison.md": digit_after(reports / "comparison.md", "| xz |", 3),
        "comparison.csv": digit_after(reports / "comparison.csv", "measured,xz,loss,,,,xz.loss,", 4),
        "index.html": digit_after(reports / "index.html", 'data-id="xz.loss">', 2),
        "ratio.png": 900,
    }
    with altered(repository, {f"reports/{name}": place for name, place in places.items()}):
        found = "\n".join(run_checks(repository, check_renderings).differences)
    assert "reports/evidence.json: evidence[xz.loss]." in found
    assert "reports/comparison.csv: line" in found
    for name in places:
        assert f"reports/{name}: " in found


def test_without_the_data_it_names_what_it_could_not_check(repository, tmp_path):
    folders = ("data", "models", ".dvc/cache")
    for folder in folders:
        shutil.move(repository / folder, tmp_path / Path(folder).name)
    try:
        found = run_checks(repository, check_lock, check_numbers)
    finally:
        for folder in folders:
            shutil.move(tmp_path / Path(folder).name, repository / folder)
    assert found.differences == []
    assert {"data/tokens", "models/compact", "data/evaluation/compact.parquet"} <= set(found.unchecked)


def test_the_command_names_what_differs(repository, renderings, monkeypatch):
    def render(record, _language):
        return renderings | {"evidence.json": json_bytes(record)}

    monkeypatch.setattr("compactgpt.reporting.verify.render_files", render)  # drawing takes seconds
    monkeypatch.chdir(repository)
    name = "reports/training.json"
    with altered(repository, {name: digit_after(repository / name, ": ")}):
        edit(repository / name, lambda report: report.update(params_sha256="0" * 64))
        done = CliRunner().invoke(app, ["verify"])
        as_json = CliRunner().invoke(app, ["verify", "--json"])
    assert done.exit_code == as_json.exit_code == CheckFailed.exit_code == 3
    assert len(json.loads(as_json.stdout)["differences"]) == done.output.count("differs: ")
    assert f"differs: {name} is not what dvc.lock has (modified)" in done.output
    assert f"differs: {name} was made with other parameters than dvc.lock has" in done.output
    assert "evidence[compact.tokens_seen].value is 409600 in the report, but 509600 if it is" in done.output


def test_differences_name_the_leaf():
    expected = {"a": [{"id": "x", "v": 1.0}, {"id": "y", "v": 2}], "b": 1}
    assert list(differences(expected, json.loads(json_bytes(expected)))) == []
    found = list(differences(expected, {"a": [{"id": "x", "v": 1.0}, {"id": "y", "v": 3}], "c": 1}))
    assert found == [
        "a[y].v is 3 in the report, but 2 if it is calculated again from the inputs",
        "b is missing in the report, but 1 if it is calculated again from the inputs",
        "c is 1 in the report, but missing if it is calculated again from the inputs",
    ]
    assert list(differences({"b": 1}, {"b": 1, "c": 2}, partial=True)) == []
