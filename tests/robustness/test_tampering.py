"""A thousand bytes of a chain, each changed after it was made: every one is found, and its file is named."""

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
from compactgpt.evaluation.likelihood import Totals, write_totals
from compactgpt.model.weights import save_model
from compactgpt.reporting.verify import Verification, check_lock, check_manifests, run_check
from tests.support.comparison_inputs import PARAMS, ROOT
from tests.support.tiny_corpus import make_documents
from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt

FLIPS, OF_LOCK = 1000, 120
DVC = "from dvc.repo import Repo; Repo.init(no_scm=True).commit(force=True)"
CHAIN = {  # folders as outs, so that the lock is short: each look at it parses it
    "download": ([], ["data/documents", "data/tokenizer"]),
    "tokenization": (["data/documents", "data/tokenizer"], ["data/tokens"]),
    "training": (["data/tokens"], ["models/compact"]),
    "evaluation": (["models/compact", "data/tokens"], ["data/evaluation"]),
    "comparison": (["data/evaluation"], ["reports"]),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Real files of every kind, the reports as they are in git, and the dvc.lock that DVC writes for them."""
    place = tmp_path_factory.mktemp("chain")
    stages = {
        name: {"cmd": f"make {name}", "deps": deps, "params": ["model.n_layer"], "outs": outs}
        for name, (deps, outs) in CHAIN.items()
    }
    (place / "dvc.yaml").write_text(json.dumps({"stages": stages}))  # JSON is YAML
    (place / "params.yaml").write_text(json.dumps({"model": {"n_layer": 2}}))
    make_documents(place / "data/documents", ["hello world", "well"])
    encoding = save_tokenizer(place / "data/tokenizer")
    with atomic_folder(place / "data/tokens") as folder:
        for name in ("train", "val"):
            save_split(folder / f"{name}.tokens", encoding)
    save_model(tiny_gpt(encoding.n_vocab, n_layer=1), place / "models/compact", {"steps": 1})
    sums = np.arange(1, 4)
    write_totals(
        place / "data/evaluation/compact.parquet", Totals(["a", "b", "c"], sums, sums, sums, sums / 3)
    )
    named = subprocess.run(
        ["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in named.stdout.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / name)
    done = subprocess.run([sys.executable, "-c", DVC], cwd=place, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def look(place: Path) -> str:
    found = Verification()
    run_check(check_lock, place, PARAMS, found)
    run_check(check_manifests, place, PARAMS, found)
    return "\n".join(found.differences)


def flipped(content: bytes, dice: random.Random) -> bytes:
    """The same with one byte made another one."""
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ dice.randrange(1, 256)]) + content[place + 1 :]


def test_a_thousand_changed_bytes_are_found_and_each_file_is_named(chain):
    """In each round one byte of every file; then the lock's, one by one."""
    dice, left = random.Random(8), FLIPS - OF_LOCK
    files = sorted(path for top in ("data", "models", "reports") for path in (chain / top).rglob("*.*"))
    before = {path: path.read_bytes() for path in files if path.is_file()}
    assert len(before) > 30
    assert look(chain) == ""
    while left > 0:
        for path, content in before.items():
            path.write_bytes(flipped(content, dice))
        told = look(chain)
        for path, content in before.items():
            assert path.relative_to(chain).as_posix() in told, path
            path.write_bytes(content)
        left -= len(before)
    lock, content = chain / "dvc.lock", (chain / "dvc.lock").read_bytes()
    values = re.finditer(rb"(?:md5|path|cmd|n_layer): (.+)", content)  # sizes are not compared
    places = [place for found in values for place in range(*found.span(1))]
    for place in dice.sample(places, OF_LOCK):
        lock.write_bytes(other := content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert "dvc.lock" in look(chain), other
    lock.write_bytes(content)
    assert look(chain) == ""
