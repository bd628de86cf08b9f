import gc
import os
import shutil
import signal
from pathlib import Path

import pytest

# Set before typer and rich are imported: their colours would split the text that tests search for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A full garbage collection takes a second when all libraries are loaded.
gc.set_threshold(100_000, 20, 100)
# Set before torch is imported: the workers share the cores already; more threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Temporary folders are in memory if there is enough: tests sync thousands of files, and disks are slow.
MEMORY, NEEDED = Path("/dev/shm"), 4 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > NEEDED:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A shell starts background jobs with SIGINT ignored, and programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_environment():
    """Undo what a test, or a library that it calls, changes in the environment and for SIGTERM.

    A stage ignores SIGTERM at its end, and every program that the next test starts would inherit that.
    """
    before = dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


# Files with the same heavy imports run in one worker, which imports them once. Files that take longest come
# first, so that at the end both workers have work.
TOGETHER = {
    "dvc": ("chain", "dvc_workflow", "dvc_yaml", "verify"),
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
    "forks", "mlflow", "transformers", "launch", "dvc", "interrupted_stages", "great_expectations",
    "sources",
)  # fmt: skip


def group_of(stem):
    """Return the group of tests that one worker runs: a file, or several."""
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


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty MLflow store: creating one takes seconds, copying it none."""
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
