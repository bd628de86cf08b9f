"""A run is run again from its record alone, by DVC itself; what is not the same is named."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from compactgpt import reproduction
from compactgpt.errors import BadConfig, MissingInput
from compactgpt.lineage import Chain, Folder, md5_path, read_chain
from compactgpt.records import Record, find, versions
from compactgpt.reproduction import DIFFERENT, IDENTICAL, ROUNDING, gaps, judge, reproduce
from compactgpt.tracking.journal import machine_facts
from compactgpt.tracking.mlflow_logger import sync
from compactgpt.tracking.pipeline_run import packages
from compactgpt.tracking.store import open_store
from tests import store

CHAIN = """
stages:
  download:
    cmd: python stages/download.py
    deps: [corpus, stages/download.py]
    outs: [data/documents]
  training:
    cmd: python stages/training.py
    deps: [data/documents, stages/training.py]
    params: [training.steps]
    outs: [models/compact, reports/training.json: {cache: false}]
"""
DOWNLOAD = """
import pathlib
folder = pathlib.Path("data/documents")
folder.mkdir(parents=True)
(folder / "a").write_text(pathlib.Path("corpus/text").read_text().upper())
"""
TRAINING = """
import json, pathlib
text = pathlib.Path("data/documents/a").read_text()
steps = int(pathlib.Path("params.yaml").read_text().split()[-1])
pathlib.Path("models/compact").mkdir(parents=True)
pathlib.Path("models/compact/weights").write_text(text * steps)
pathlib.Path("reports").mkdir(exist_ok=True)
pathlib.Path("reports/training.json").write_text(json.dumps({"val_loss": len(text) / steps}))
"""
FILES = {
    "dvc.yaml": CHAIN,
    "params.yaml": "training:\n  steps: 3\n",
    "stages/download.py": DOWNLOAD,
    "stages/training.py": TRAINING,
    "corpus/README.md": "the user's own",
    ".gitignore": "/data\n/models\n/.state\n/mlflow.db*\n/mlartifacts\n/corpus/text\n",
}


def dvc(root: Path, *words: str) -> None:
    env = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run([sys.executable, "-m", "dvc", *words, "-q"], cwd=root, env=env, check=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, empty_store):
    """A committed project whose pipeline ran with uncommitted changes, known to MLflow."""
    root = tmp_path_factory.mktemp("ran") / "a b"
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    (root / "corpus/text").write_text("some text")
    (root / "mlflow.db").write_bytes(empty_store)
    store.git(root, "init", "-q")
    dvc(root, "init")
    store.git(root, "add", ".")
    store.git(root, "commit", "-qm", "x")
    (root / "params.yaml").write_text("training:\n  steps: 4\n")
    dvc(root, "repro")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.chdir(root)
        sync(root, record_unrun=True)
    return root


@pytest.fixture
def root(ran, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(ran)  # artifact paths are relative to the repository
    return ran


@pytest.fixture
def record(root, tmp_path):
    (run,) = store.runs(root)
    return find(root, run.info.run_id[:10], tmp_path)


def test_a_dirty_run_is_run_again_from_its_record_and_a_tampered_one_is_different(root, record):
    before = store.git(root, "status", "--porcelain")
    assert gaps(record, root) == []
    told = []
    result = reproduce(record, root, say=told.append)
    assert result.verdict == IDENTICAL
    assert told[-1] == "the data comes from DVC's cache, by its hash"
    assert [one.stage for one in result.stages] == ["download", "training"]
    assert store.git(root, "status", "--porcelain") == before
    assert list((root / ".state/reproductions").iterdir()) == []
    tampered = record.diff.replace(b"+  steps: 4", b"+  steps: 5")
    lock = record.place.read("dvc.lock").replace(md5_path(root / "models/compact").encode(), b"0" * 32)
    (record.place.root / "dvc.lock").write_bytes(lock)
    assert tampered != record.diff
    changed = replace(record, chain=read_chain(record.place))
    result = reproduce(changed, root, rebuild=True)
    assert (result.verdict, result.first) == (DIFFERENT, "training")
    assert result.exit_code == 3
    assert "models/compact" in result.why


def test_missing_things_are_named_before_anything_runs(root, record):
    assert [gap.what for gap in gaps(replace(record, commit="f" * 40), root)] == ["commit"]
    assert [gap.what for gap in gaps(replace(record, diff=None), root)] == ["changes"]
    with pytest.raises(MissingInput, match="were not kept"):
        reproduce(replace(record, diff=None), root)
    other = {**record.packages, "numpy": "0.1"}
    (gap,) = gaps(replace(record, packages=other), root)
    assert gap.message.startswith("numpy was 0.1, here it is ")
    assert not gap.fatal
    (gap,) = gaps(replace(record, machine={**record.machine, "cpu.vectors": "sve"}), root)
    assert "cpu.vectors was sve" in gap.message


def test_data_that_is_neither_cached_nor_can_be_made_is_missing(root, record, monkeypatch):
    monkeypatch.setattr("compactgpt.lineage.Cache.has", lambda *_: False)
    assert [gap.what for gap in gaps(record, root)] == []
    text = root / "corpus/text"
    content = text.read_text()
    text.write_text("changed since")
    assert [(gap.what, gap.fatal) for gap in gaps(record, root)] == [("corpus", True)]
    text.write_text(content)


def recorded(tmp_path, loss: float, **changes) -> Record:
    """A record of one stage with a report."""
    (tmp_path / "reports").mkdir(exist_ok=True)
    (tmp_path / "reports/training.json").write_text(json.dumps({"val_loss": loss}))
    (tmp_path / "dvc.yaml").write_text("stages: {training: {cmd: x}}")
    store.save_lock(tmp_path, {"training": ["reports/training.json"]}, **changes)
    place, known = Folder(tmp_path), versions(packages())
    return Record("run", place, read_chain(place), machine=machine_facts(), packages=known)


def two(tmp_path, then: float, now: float, machine=None, **changes) -> tuple[Record, Chain, Folder]:
    folders = [tmp_path / name for name in ("then", "now")]
    for folder in folders:
        folder.mkdir()
    old, new = recorded(folders[0], then), recorded(folders[1], now, **changes)
    return replace(old, machine={**old.machine, **(machine or {})}), new.chain, new.place


def test_another_processor_explains_a_difference_within_rounding_only(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864, {"cpu.vectors": "sse"}))
    assert result.verdict == ROUNDING
    assert result.exit_code == 0
    assert "cpu.vectors: sse then" in result.why
    assert "0.14%" in result.why


def test_the_same_difference_on_the_same_machine_is_no_rounding(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864))
    assert (result.verdict, result.first) == (DIFFERENT, "training")
    assert "val_loss differs by 0.14%" in result.why


def test_a_large_difference_is_no_rounding_on_any_machine(tmp_path):
    result = judge(*two(tmp_path, 4.857, 5.2, {"cpu.vectors": "sse"}))
    assert result.verdict == DIFFERENT
    assert "more than rounding" in result.why


def test_other_parameters_are_named(tmp_path):
    result = judge(*two(tmp_path, 4.857, 4.864, {"cpu.vectors": "sse"}, steps=5))
    assert (result.verdict, result.why) == (DIFFERENT, "training has other params")


def test_a_name_that_means_nothing_or_too_much_is_refused(root, tmp_path):
    with pytest.raises(BadConfig, match="no run of MLflow"):
        find(root, "nothing", tmp_path)
    store_of_root = open_store(root)
    client, experiment = store_of_root.client, store_of_root.experiment
    bare = client.create_run(experiment, run_name="by hand").info.run_id
    with pytest.raises(MissingInput, match=r"keeps no dvc\.lock"):
        find(root, bare, tmp_path / "none")
    client.delete_run(bare)
    with pytest.raises(BadConfig, match="is no run"):
        reproduction.of("workspace", root, check=True, rebuild=False, keep=False, say=print)
