import os
from collections import Counter

import pytest

COUNTS = pytest.StashKey[Counter]()

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
def counted(request):
    """Counts of faults that were tried and survived: told in one line when all tests have ended."""
    return request.config.stash.setdefault(COUNTS, Counter())


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(COUNTS, {})
    if counts:
        told = ", ".join(f"{number:,} {what}" for what, number in counts.items())
        terminalreporter.write_line(f"tried, and survived: {told}")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty MLflow store: making one takes seconds, copying it none."""
    from tests.store import made_store

    return made_store(tmp_path_factory.mktemp("store"))
