"""Hundreds of bytes of a pipeline, each changed after it ran: every one is found, and its output is named."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compactgpt.common.storage import atomic_folder
from compactgpt.evaluation.totals import Totals, write_totals
from compactgpt.model.weights import save_model
from compactgpt.reporting.verify import Verification, check_lock, run_check
from tests.support.comparison_inputs import PARAMS, ROOT
from tests.support.tiny_corpus import make_documents
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt
from tests.support.tracking_store import git

ROUNDS, OF_LOCK = 12, 40
DVC = "from dvc.repo import Repo; Repo.init(no_scm=True).commit(force=True)"
CHAIN = {  # folders as outs, so that the lock is short: each check parses it
    "download": ([], ["data/documents", "data/tokenizer"]),
    "tokenization": (["data/documents", "data/tokenizer"], ["data/tokens"]),
    "training": (["data/tokens"], ["models/compact"]),
    "evaluation": (["models/compact", "data/tokens"], ["data/evaluation"]),
    "comparison": (["data/evaluation"], ["reports"]),
}


@pytest.fixture
def chain(tmp_path):
    """Real files of every kind, the reports as they are in git, and the dvc.lock that DVC writes for them."""
    stages = {
        name: {"cmd": f"make {name}", "deps": deps, "params": ["model.n_layer"], "outs": outs}
        for name, (deps, outs) in CHAIN.items()
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))  # JSON is YAML
    (tmp_path / "params.yaml").write_text(json.dumps({"model": {"n_layer": 2}}))
    make_documents(tmp_path / "data/documents", ["hello world", "well"])
    encoding = save_tokenizer(tmp_path / "data/tokenizer")
    with atomic_folder(tmp_path / "data/tokens") as folder:
        for name in ("train", "val"):
            save_split(folder / f"{name}.tokens", encoding)
    save_model(tiny_gpt(encoding.n_vocab, n_layer=1), tmp_path / "models/compact")
    sums = np.arange(1, 4)
    totals = Totals(["a", "b", "c"], sums, sums, sums, sums / 3)
    write_totals(tmp_path / "data/evaluation/compact.parquet", totals)
    for name in git(ROOT, "ls-files", "reports").splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-c", DVC], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def find_differences(place: Path) -> str:
    found = Verification()
    run_check(check_lock, place, PARAMS, found)
    return "\n".join(found.differences)


def test_changed_bytes_are_found_and_each_output_is_named(chain):
    """In each round one byte of every file; then bytes of the lock's values, one by one."""
    dice = random.Random(8)
    files = sorted(path for top in ("data", "models", "reports") for path in (chain / top).rglob("*.*"))
    before = {path: path.read_bytes() for path in files if path.is_file()}
    assert len(before) > 30
    assert find_differences(chain) == ""
    for _ in range(ROUNDS):
        for path, content in before.items():
            place, change = dice.randrange(len(content)), dice.randrange(1, 256)
            path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        found = find_differences(chain)
        for path, content in before.items():
            (out,) = (out for _, outs in CHAIN.values() for out in outs if path.is_relative_to(chain / out))
            assert f"{out} is not what dvc.lock has" in found, path
            path.write_bytes(content)
    lock, content = chain / "dvc.lock", (chain / "dvc.lock").read_bytes()
    values = re.finditer(rb"(?:md5|path|cmd|n_layer): (.+)", content)  # sizes are not compared
    places = [place for value in values for place in range(*value.span(1))]
    for place in dice.sample(places, OF_LOCK):
        lock.write_bytes(other := content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert "dvc.lock" in find_differences(chain), other
