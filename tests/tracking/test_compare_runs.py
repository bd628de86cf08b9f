"""Comparison of two versions: what differs, and whether metrics differ by more than chance."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadData
from compactgpt.evaluation.metrics import perplexity_ratio
from compactgpt.evaluation.totals import Totals, write_totals
from compactgpt.tracking.compare_runs import compare
from compactgpt.tracking.records import parse_versions
from tests.support import tracking_store

TOKENS = np.array([100, 200, 50, 150])
NATS = np.array([450.0, 900.0, 230.0, 640.0])


def commit_evaluation(root, nats, ids=("a", "b", "c", "d"), **params):
    """Write the files of an evaluation, and commit them."""
    totals = Totals(
        list(ids), bytes=TOKENS * 3, tokens=TOKENS, own_tokens=TOKENS, words=None, nats=nats, views={}
    )
    write_totals(root / "data/evaluation/compact.parquet", totals)
    (root / "reports").mkdir(exist_ok=True)
    loss = nats.sum() / TOKENS.sum()
    (root / "reports/evaluation.json").write_text(json.dumps({"loss": {"value": loss}}))
    (root / "params.yaml").write_text(json.dumps({"training": {"steps": 1, **params}}))
    tracking_store.save_lock(root, {"evaluation": ["data/evaluation", "reports/evaluation.json"]})
    tracking_store.git(root, "add", "-A")
    tracking_store.git(root, "commit", "-qm", "x")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {evaluation: {cmd: x}}")
    (tmp_path / ".gitignore").write_text("/data\n/.dvc\n")
    (tmp_path / "requirements.lock").write_text("numpy==1.0\ntorch==2.0 ; sys_platform == 'linux'\n")
    tracking_store.git(tmp_path, "init", "-q")
    commit_evaluation(tmp_path, NATS)
    return tmp_path


def test_two_revisions_are_compared_in_all_that_differs(root):
    (root / "src").mkdir()
    (root / "src/new.py").write_text("x = 1\n")
    (root / "requirements.lock").write_text("numpy==1.1 \\\n    --hash=sha256:0a\ntorch==2.0\n")
    better = NATS * [0.9, 0.88, 0.91, 0.9]
    commit_evaluation(root, better, steps=2)
    found = compare("HEAD~1", "HEAD", root)
    assert found.params == {"training.steps": (1, 2)}
    assert found.environment == {"numpy": ("1.0", "1.1")}
    assert list(found.data) == ["data/evaluation"]
    assert list(found.metrics) == ["evaluation: loss"]
    assert "src/new.py" in found.code
    expected = perplexity_ratio(better, NATS, TOKENS.astype(float))
    assert found.ratios == {"compact": expected}
    assert "  training.steps  1 -> 2" in found.lines()
    assert found.lines()[-1].startswith(f"  compact: {expected.value:.4f}")
    assert found.lines()[-1].endswith(": significant")
    assert json.loads(json.dumps(asdict(found)))["ratios"]["compact"]["value"] == expected.value


def test_a_diverged_version_has_a_ratio_that_is_infinite_and_no_number_of_json(root, monkeypatch):
    commit_evaluation(root, NATS * 1e6)
    monkeypatch.chdir(root)
    shown = CliRunner().invoke(app, ["diff", "HEAD~1", "HEAD"]).stdout
    assert shown.splitlines()[-1].startswith("  compact: inf (")
    as_json = CliRunner().invoke(app, ["diff", "HEAD~1", "HEAD", "--json"]).stdout
    ratio = json.loads(as_json, parse_constant=pytest.fail)["ratios"]["compact"]
    assert (ratio["value"], ratio["high"]) == (None, None)


def test_equal_versions_and_chance_are_no_difference(root):
    found = compare("HEAD", "HEAD", root)
    assert (found.params, found.data, found.code, found.metrics) == ({}, {}, "", {})
    assert found.lines()[-1].endswith("1.0000 (1.0000 to 1.0000): no significant difference")
    commit_evaluation(root, NATS * [1.02, 0.99, 0.98, 1.005])
    found = compare("HEAD~1", "HEAD", root)
    assert found.ratios["compact"].low < 1.0 < found.ratios["compact"].high
    assert found.lines()[-1].endswith("no significant difference")


def test_other_documents_are_not_paired_and_uncommitted_changes_are_named(root):
    commit_evaluation(root, NATS, ids=("a", "b", "c", "e"))
    (root / "dvc.yaml").write_text("stages: {evaluation: {cmd: other}}")
    found = compare("HEAD~1", "workspace", root)
    assert found.ratios == {}
    assert found.unpaired == ["compact: no ratio, because the documents of the val split differ"]
    assert found.code.endswith("workspace had uncommitted changes: dvc.yaml")


def test_the_packages_of_a_lock_are_those_of_this_python():
    lock = """
a==1 ; python_full_version < '3'
a==2 ; python_full_version >= '3'
c==1 ; sys_platform == 'none'
B_b==3"""
    assert parse_versions(lock) == {"a": "2", "b-b": "3"}


@pytest.mark.parametrize("content", ["{bad", "[]"])
def test_a_damaged_report_is_named(root, content):
    (root / "reports/evaluation.json").write_text(content)
    with pytest.raises(BadData, match=r"reports/evaluation\.json of .* is not a JSON object"):
        compare("HEAD", "workspace", root)
