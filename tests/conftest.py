import gc
import os
import shutil
import signal
from pathlib import Path

import pytest

# Set before typer and rich are imported. Their colours would split the text that tests search for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A full garbage collection takes a second when all libraries are loaded.
gc.set_threshold(100_000, 20, 100)
# Set before torch is imported. The test workers share the cores, so more threads would only wait.
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


# Files that take longest come first, so that at the end both workers have work.
LONGEST = (
    "distributed", "trainer", "launch", "tracking", "reproduce", "registry", "baselines", "verify", "chain",
    "dvc_workflow", "interrupted_stages", "validation", "inspection", "sources",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Order the files, and leave the tests of each in their order."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
