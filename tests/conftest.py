import os

import pytest

# Set before typer and rich are imported: their colours would split the words that tests look for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def same_environment():
    """What a test leaves in the environment, or a library that it calls, ends with the test."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty MLflow store: making one takes seconds, copying it none."""
    from tests.store import made_store

    return made_store(tmp_path_factory.mktemp("store"))
