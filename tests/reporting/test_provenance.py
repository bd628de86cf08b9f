"""The chain of a value: its stage's code, what the stage read, the commit that wrote it down, the run."""

import json
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import MissingInput
from compactgpt.reporting.provenance import (
    code_hashes,
    find_lock_commit,
    find_value,
    stage_modules,
    trace,
)
from compactgpt.tracking.dvc_files import Folder, entry_key, read_chain
from compactgpt.tracking.store import open_store, run_of_value
from tests.support.comparison_inputs import ROOT

VALUE = {
    "id": "compact.loss",
    "value": 4.5,
    "unit": "nats per token",
    "known": "measured",
    "source": "a report",
    "report": "reports/evaluation.json",
    "stage": "evaluation",
    "code_sha256": "c" * 64,
    "data_sha256": "d" * 64,
    "weights_sha256": "",
}
RECORD = {"evidence": [VALUE, {**VALUE, "id": "compact.perplexity"}]}
LOCK = """schema: '2.0'
stages:
  tokenization:
    cmd: exec python -m stages.tokenization
    outs:
    - path: data/tokens
      md5: aaa.dir
  training:
    cmd: exec python -m stages.training
    deps:
    - path: data/tokens
      md5: aaa.dir
    outs:
    - path: models/compact
      md5: bbb.dir
  evaluation:
    cmd: exec python -m stages.evaluation
    deps:
    - path: data/tokens
      md5: aaa.dir
    - path: models/compact
      md5: bbb.dir
    outs:
    - path: reports/evaluation.json
      md5: ccc
"""

PIPELINE = """
stages:
  evaluation:
    cmd: exec python -m stages.evaluation
    deps: [data/tokens, models/compact]
    outs: [reports/evaluation.json]
  tokenization: {cmd: exec python -m stages.tokenization, outs: [data/tokens]}
  training: {cmd: exec python -m stages.training, deps: [data/tokens], outs: [models/compact]}
  other: {cmd: exec python -m stages.other, outs: [data/other]}
"""


def git(place, *words):
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", *who, *words], cwd=place, check=True, capture_output=True)


@pytest.fixture
def place(tmp_path):
    """Two commits: the first changes the evaluation's entry, the second another stage's."""
    git(tmp_path, "init", "-q")
    for text, subject in ((LOCK, "first"), (LOCK.replace("ccc", "eee"), "mine"), ("", "other")):
        text = text or LOCK.replace("ccc", "eee").replace("schema", "# a\nschema")
        (tmp_path / "dvc.lock").write_text(text)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", subject)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/evidence.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_the_chain_of_a_value(place):
    lines = trace(place, RECORD, "compact.loss")
    told = dict(lines)
    assert told["value"] == "4.5 nats per token, measured"
    assert told["needs"] == "tokenization -> training"
    read = [found for what, found in lines if what == "read"]
    assert read == ["data/tokens  md5 aaa.dir", "models/compact  md5 bbb.dir"]
    assert told["wrote"] == "reports/evaluation.json  md5 eee"
    assert told["commit"].endswith(" mine")


def test_an_entry_that_git_does_not_have_says_so(place):
    (place / "dvc.lock").write_text(LOCK)
    assert find_lock_commit(place, "evaluation") == "not committed yet"
    shutil.rmtree(place / ".git")
    assert find_lock_commit(place, "evaluation") == "not under git"


def test_an_unknown_value_is_answered_with_those_alike():
    with pytest.raises(MissingInput, match=r"compact\.los; there are compact\.loss"):
        find_value(RECORD, "compact.los")


def test_code_is_hashed_by_what_a_stage_uses(tmp_path):
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    before = code_hashes(tmp_path)
    assert before == code_hashes(ROOT)
    assert "reporting/html" in stage_modules(ROOT, ROOT / "stages/comparison.py")
    with open(tmp_path / "src/compactgpt/training/optim.py", "a") as file:
        file.write("# another line\n")
    after = code_hashes(tmp_path)
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert "training" in changed
    assert not changed & {"download", "tokenization", "baseline", "comparison", "estimate"}


def test_the_run_that_made_what_the_lock_has_is_found(place, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_of_value(place, "evaluation").startswith("no MLflow store here")
    opened = open_store(place)
    entry = read_chain(Folder(place)).entries["evaluation"]
    wanted = opened.client.create_run(opened.experiment, tags={"lock_entry": entry_key(entry)}).info.run_id
    assert run_of_value(place, "evaluation") == f"{wanted} (evaluation)"
    assert run_of_value(place, "training") == "no run in the store made what dvc.lock has of training"
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["trace", "compact.loss"])
    assert done.exit_code == 0, done.output
    assert wanted in done.output
    facts = json.loads(CliRunner().invoke(app, ["trace", "compact.loss", "--json"]).stdout)
    assert facts["evidence"]["id"] == "compact.loss"
    assert wanted in facts["MLflow run"][0]
    (place / "mlflow.db").write_bytes(b"no database" * 400)
    done = CliRunner().invoke(app, ["trace", "compact.loss"])
    assert done.exit_code == 65
    assert done.output.count("\n") == 1
    assert "mlflow.db is damaged" in done.output
