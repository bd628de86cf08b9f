"""A Ray cluster gives the results of this machine, in the same order."""

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from compactgpt.common.errors import BadData
from compactgpt.config import Tokenization
from compactgpt.data.tokenization import run_on_ray, tokenize
from tests.support.tiny_corpus import make_documents, make_tokenizer
from tests.support.worker_functions import square, wait_first_time

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: make test-ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def ray_path(monkeypatch):
    """Let the workers of a local cluster import the tests."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def test_an_error_of_a_task_is_raised_without_rays_traceback():
    with pytest.raises(BadData, match=r"^thirteen is refused$"):
        list(run_on_ray(square, [1, 13], 2))


def test_a_worker_of_the_cluster_that_is_killed_midway_changes_nothing(tmp_path):
    results = run_on_ray(wait_first_time, [(tmp_path, number) for number in range(8)], 2)
    assert [next(results), next(results)] == [0, 1]
    pid_file = tmp_path / "2.pid"
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.05)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert list(results) == [number * number for number in range(2, 8)]


def test_token_files_of_a_cluster_are_those_of_this_machine(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    texts = [f"hello {n} world, {n * n}\n" * 500 for n in range(100)]
    documents = make_documents(tmp_path / "documents", texts, shard_bytes=100_000)
    files = []
    for engine in ("local", "ray"):
        params, out = Tokenization(val_fraction=0.5, engine=engine), tmp_path / engine
        tokenize(documents, tokenizer, out, params, num_workers=2, state=tmp_path / "state")
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]
