"""A fixture for tests that write Data Docs, since GX compiles each template for each page."""

from functools import partial

import pytest
from jinja2 import Environment, FileSystemBytecodeCache


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Compile each template once per test module, which saves most of the time."""
    cache = FileSystemBytecodeCache(str(tmp_path_factory.mktemp("templates")))
    with pytest.MonkeyPatch.context() as patch:
        cached = partial(Environment, bytecode_cache=cache)
        patch.setattr("great_expectations.render.view.view.Environment", cached)
        yield
