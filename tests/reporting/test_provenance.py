"""Where a value comes from: the code of its stage, what the stage read, the commit of its entry, the run."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import MissingInput
from compactgpt.reporting.provenance import code_hashes, find_lock_commit, find_value, stage_modules, trace
from compactgpt.tracking.dvc_files import Folder, entry_key, read_chain
from compactgpt.tracking.store import open_store, run_of_value
from tests.support.comparison_inputs import ROOT
from tests.support.tracking_store import git

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


@pytest.fixture
def place(tmp_path):
    """Three commits: the second changes the evaluation's entry in dvc.lock, the third another line."""
    git(tmp_path, "init", "-q")
    changed = LOCK.replace("ccc", "eee")
    for text, subject in ((LOCK, "first"), (changed, "mine"), (f"# a\n{changed}", "other")):
        (tmp_path / "dvc.lock").write_text(text)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", subject)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/evidence.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_a_value_is_traced_to_report_stage_files_and_commit(place):
    lines = trace(place, RECORD, "compact.loss")
    found = dict(lines)
    assert found["value"] == "4.5 nats per token, measured"
    assert found["needs"] == "tokenization -> training"
    read = [what for label, what in lines if label == "read"]
    assert read == ["data/tokens  md5 aaa.dir", "models/compact  md5 bbb.dir"]
    assert found["wrote"] == "reports/evaluation.json  md5 eee"
    assert found["commit"].endswith(" mine")
    (place / "dvc.lock").write_text(LOCK)
    assert find_lock_commit(place, "evaluation") == "not committed yet"
    shutil.rmtree(place / ".git")
    assert find_lock_commit(place, "evaluation") == "not under git"


def test_an_unknown_value_is_answered_with_similar_names():
    with pytest.raises(MissingInput, match=r"compact\.los; similar ids: compact\.loss"):
        find_value(RECORD, "compact.los")


def test_code_is_hashed_by_the_modules_that_a_stage_imports(tmp_path):
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    before = code_hashes(tmp_path)
    assert before == code_hashes(ROOT)
    assert "reporting/pages" in stage_modules(ROOT, ROOT / "stages/comparison.py")
    with open(tmp_path / "src/compactgpt/training/optim.py", "a") as file:
        file.write("# another line\n")
    after = code_hashes(tmp_path)
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert "training" in changed
    assert not changed & {"download", "tokenization", "baseline", "comparison", "estimate"}


def test_the_run_that_wrote_what_the_lock_has_is_found(place, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_of_value(place, "evaluation").startswith("no MLflow store here")
    (place / "mlflow.db").write_bytes(empty_store)
    store = open_store(place)
    entry = read_chain(Folder(place)).entries["evaluation"]
    wanted = store.client.create_run(store.experiment, tags={"lock_entry": entry_key(entry)}).info.run_id
    assert run_of_value(place, "evaluation") == f"{wanted} (evaluation)"
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["trace", "compact.loss"])
    assert done.exit_code == 0, done.output
    assert wanted in done.output
    facts = json.loads(CliRunner().invoke(app, ["trace", "compact.loss", "--json"]).stdout)
    assert facts["evidence"]["id"] == "compact.loss"
    assert wanted in facts["MLflow run"][0]
    (place / "mlflow.db").write_bytes(b"no database" * 400)
    done = CliRunner().invoke(app, ["trace", "compact.loss"])
    assert (done.exit_code, done.output.count("\n")) == (65, 1)
    assert "mlflow.db is damaged" in done.output
