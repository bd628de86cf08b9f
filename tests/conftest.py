import gc
import os
import shutil
import signal
from pathlib import Path

import pytest

# Set before typer and rich are imported: their colours would split the words that tests look for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A full collection takes a second where all of our libraries are loaded.
gc.set_threshold(100_000, 20, 100)
# Before torch is imported: the workers share the cores already, and more threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# The tests' folders lie in memory where there is enough: thousands of files are synced, and disks are slow.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(autouse=True)
def same_environment():
    """What a test leaves in the environment, or a library that it calls, ends with the test.

    So does a door's way with SIGTERM, which it ignores at its end: so would every program that is started.
    """
    before = dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


# What is heavy to import is imported by one worker of two, and what they fork from is made once. What takes
# longest comes first, so that none is left alone with it at the end.
TOGETHER = {
    "dvc": ("chain", "dvc_workflow", "dvc_yaml", "params_layout", "verify"),
    "forks": ("distributed", "fsdp", "trainer"),
    "mlflow": (
        "faulty_servers", "pipeline_run", "provenance", "registry", "gate", "reproduce", "security",
        "tracking",
    ),
    "great_expectations": ("inspection", "validation"),
    "transformers": (
        "bad_input", "baselines", "cli", "experiments", "huggingface", "generation", "initialization",
        "metamorphic", "gpt",
    ),
}  # fmt: skip
LONGEST = (
    "forks", "mlflow", "transformers", "launching", "dvc", "interrupted_stages", "great_expectations",
    "download",
)  # fmt: skip


def group_of(stem):
    """The tests that one worker runs: those of a file, or of several."""
    name = stem.removeprefix("test_")
    return next((group for group, files in TOGETHER.items() if name in files), name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each group to one worker, which xdist 3.8's own loadgroup does not do on pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(Path(nodeid.partition("::")[0]).stem)

    return LoadGroups(config, log)


def pytest_collection_modifyitems(items):
    """Order the groups, and leave the tests of each in their order."""
    order = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.path.stem), len(order)))


def pytest_sessionfinish():
    """Collect once what is left over, where pytest would five times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty MLflow store: making one takes seconds, copying it none."""
    from tests.support.tracking_store import made_store

    return made_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def trained_project(tmp_path, empty_store, monkeypatch):
    """A project with a trained model and an empty MLflow store, as the current folder."""
    from tests.support.trained_project import fill

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    fill(tmp_path)
    return tmp_path
