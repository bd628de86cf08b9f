"""One function over many tasks, on this machine or on a Ray cluster: the same results in the same order."""

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from compactgpt.common.console import silent
from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.storage import sha256_file
from compactgpt.config import Tokenization
from compactgpt.data import documents as documents_room
from compactgpt.data.engines import run_tasks
from compactgpt.data.tokenization import tokenize
from tests.support.tiny_corpus import make_documents, make_tokenizer

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: make test-ray")


def square(number: int) -> int:
    if number < 0:
        raise BadData(f"found {number}")
    return number * number


def slow_first_time(task: tuple[Path, int]) -> int:
    """Tell which process is at it, and wait to be killed, but only once a task."""
    folder, number = task
    mark = folder / f"{number}.pid"
    if number == 2 and not mark.exists():
        mark.write_text(str(os.getpid()))
        time.sleep(60)
    return number * number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(num_workers):
    assert list(run_tasks("local", square, range(6), num_workers)) == [0, 1, 4, 9, 16, 25]


def test_an_error_is_the_tasks_own():
    with pytest.raises(BadData, match="found -1"):
        list(run_tasks("local", square, [1, -1], 1))


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_ray_that_is_not_installed_is_one_sentence():
    with pytest.raises(BadConfig, match=r"tokenization\.engine is ray, which is not installed: pip install"):
        list(run_tasks("ray", square, [1], 1))


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    places = [str(Path(__file__).parents[2] / part) for part in ("src", ".", "tests")]
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield ray
    ray.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_results_and_errors(cluster):
    assert list(run_tasks("ray", square, range(30), 2)) == list(map(square, range(30)))
    with pytest.raises(BadData, match="found -1"):
        list(run_tasks("ray", square, [1, -1], 2))


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_worker_of_the_cluster_that_is_killed_midway_changes_nothing(cluster, tmp_path):
    results = run_tasks("ray", slow_first_time, [(tmp_path, number) for number in range(8)], 2)
    assert [next(results), next(results)] == [0, 1]
    mark = tmp_path / "2.pid"
    while not mark.exists() or not mark.read_text():
        time.sleep(0.05)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    assert list(results) == [number * number for number in range(2, 8)]


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_token_files_of_a_cluster_that_loses_a_worker_are_those_of_this_machine(
    cluster, tmp_path, monkeypatch
):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(documents_room, "ROW_GROUP_BYTES", 50_000)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    texts = [f"hello {n} world, {n * n}\n" * 500 for n in range(400)]
    documents = make_documents(tmp_path / "documents", texts)
    killed = []

    def kill_a_worker(done, total, figures=None):
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.cmdline()[:1] == ["ray::encode_group"]
        ]
        if workers and len(killed) < 2:
            workers[0].kill()
            killed.append(done)

    files = {}
    for engine in ("local", "ray"):
        params = Tokenization(val_fraction=0.5, engine=engine)
        out = tmp_path / engine
        progress = kill_a_worker if engine == "ray" else silent
        state = tmp_path / "state"
        tokenize(documents, tokenizer, out, params, num_workers=2, state=state, progress=progress)
        files[engine] = {path.name: sha256_file(path) for path in out.iterdir()}
    assert files["local"] == files["ray"]
    assert killed
