import fcntl
import os

import pytest

# Set before typer and rich are imported: their colours would split the words that tests look for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: the workers share the cores already, and more threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


@pytest.fixture(autouse=True)
def same_environment():
    """What a test leaves in the environment, or a library that it calls, ends with the test."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


# What takes longest comes first, so that no worker is left alone with it at the end (--dist loadfile).
LONGEST = ("verification", "training", "launching", "download", "inspection", "experiments", "comparison")


def pytest_collection_modifyitems(items):
    """Order the files, and leave the tests of each in their order."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty MLflow store: making one takes seconds, copying it none. The workers share it."""
    from tests.store import made_store

    alone = "PYTEST_XDIST_WORKER" not in os.environ
    base = tmp_path_factory.getbasetemp()
    kept = (base if alone else base.parent) / "empty.db"
    with open(kept.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(made_store(tmp_path_factory.mktemp("store")))
    return kept.read_bytes()
