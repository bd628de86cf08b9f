"""Where a value comes from: the code of its stage, what the stage read, the commit of its entry, the run."""

import json
import shutil
from dataclasses import asdict

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import MissingInput
from compactgpt.common.storage import write_json, write_text
from compactgpt.reporting.claims import Evidence
from compactgpt.reporting.provenance import code_hashes, find_value, trace
from compactgpt.tracking.dvc_files import Folder, entry_key, read_entries
from compactgpt.tracking.store import open_store, run_of_value
from tests.support.tracking_store import git

VALUE = asdict(
    Evidence(
        "compact.loss", 4.5, "nats per token", "measured", "compact", "a report", stage="evaluation",
        report="reports/evaluation.json", data_sha256="d" * 64, code_sha256="c" * 64,
    )
)  # fmt: skip
RECORD = {"evidence": [VALUE, {**VALUE, "id": "compact.perplexity"}]}
MD5 = {"data/tokens": "aaa.dir", "models/compact": "bbb.dir", "reports/evaluation.json": "ccc"}
STAGES = {  # name -> (deps, outs)
    "evaluation": (["data/tokens", "models/compact"], ["reports/evaluation.json"]),
    "tokenization": ([], ["data/tokens"]),
    "training": (["data/tokens"], ["models/compact"]),
}


def write_stages(path, **md5):
    """Write dvc.yaml, or dvc.lock with the MD5 of each path, in DVC's format."""
    is_lock, hashes = path.suffix == ".lock", {**MD5, **md5}

    def listed(paths):
        return [{"path": one, "md5": hashes[one]} for one in paths] if is_lock else paths

    stages = {
        stage: {"cmd": f"exec python -m stages.{stage}", "deps": listed(deps), "outs": listed(outs)}
        for stage, (deps, outs) in STAGES.items()
    }
    YAML().dump({"stages": stages} | ({"schema": "2.0"} if is_lock else {}), path)


@pytest.fixture
def project(tmp_path):
    """Three commits: the second changes the evaluation's output in dvc.lock, the third another path."""
    git(tmp_path, "init", "-q")
    changes = {"first": {}, "mine": {"reports/evaluation.json": "eee"}, "other": {"data/tokens": "ddd.dir"}}
    md5 = {}
    for subject, changed in changes.items():
        md5 |= changed
        write_stages(tmp_path / "dvc.lock", **md5)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", subject)
    (tmp_path / ".dvc").mkdir()
    write_stages(tmp_path / "dvc.yaml")
    write_json(tmp_path / "reports/evidence.json", RECORD)
    return tmp_path


def test_a_value_is_traced_to_report_stage_files_and_commit(project):
    lines = trace(project, VALUE)
    found = dict(lines)
    assert found["value"] == "4.5 nats per token, measured"
    assert found["needs"] == "tokenization -> training"
    read = [what for label, what in lines if label == "read"]
    assert read == ["data/tokens  md5 ddd.dir", "models/compact  md5 bbb.dir"]
    assert found["wrote"] == "reports/evaluation.json  md5 eee"
    assert found["commit"].endswith(" mine")
    write_stages(project / "dvc.lock", **{"reports/evaluation.json": "fff"})
    assert trace(project, VALUE)[-1] == ("commit", "not committed yet")
    shutil.rmtree(project / ".git")
    assert trace(project, VALUE)[-1] == ("commit", "not under git")
    with pytest.raises(MissingInput, match=r"compact\.los; similar ids: compact\.loss"):
        find_value(RECORD, "compact.los")


def test_a_stages_code_is_hashed_by_the_dependencies_of_dvc_yaml(project):
    stages = {"a": {"cmd": "a", "deps": ["src/b", "stages/a.py", "data"]}, "b": {"cmd": "b"}}
    (project / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    files = ("src/b/c.py", "src/e.py", "stages/a.py", "data/d.py")
    hashes = []
    for changed in (None, "src/b/c.py", "stages/a.py", "data/d.py", "src/e.py"):
        for path in files:
            write_text(project / path, f"# {path == changed}")
        hashes.append(code_hashes(project))
    first, *others = hashes
    assert [one["a"] == first["a"] for one in others] == [False, False, True, True]
    assert all(one["b"] == first["b"] for one in others)


def test_the_run_that_wrote_what_the_lock_has_is_found(project, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_of_value(project, "evaluation").startswith("no MLflow store here")
    (project / "mlflow.db").write_bytes(empty_store)
    store = open_store(project)
    entry = read_entries(Folder(project))["evaluation"]
    wanted = store.client.create_run(store.experiment, tags={"lock_entry": entry_key(entry)}).info.run_id
    monkeypatch.chdir(project)
    done = CliRunner().invoke(app, ["trace", "compact.loss"])
    assert done.exit_code == 0, done.output
    assert f"{wanted} (evaluation)" in done.output
