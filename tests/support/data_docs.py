"""Great Expectations' pages: it compiles its templates for every page again, which takes most of the time."""

from functools import partial

import pytest
from jinja2 import BytecodeCache, Environment


class Compiled(BytecodeCache):
    """What templates were compiled to, for the length of a process."""

    def __init__(self) -> None:
        self.known: dict[str, bytes] = {}

    def load_bytecode(self, bucket) -> None:
        if bucket.key in self.known:
            bucket.bytecode_from_string(self.known[bucket.key])

    def dump_bytecode(self, bucket) -> None:
        self.known[bucket.key] = bucket.bytecode_to_string()


COMPILED = Compiled()


@pytest.fixture(scope="module")
def compiled_once():
    """Let every page be made from templates that were compiled for the first one."""
    with pytest.MonkeyPatch.context() as patch:
        kept = partial(Environment, bytecode_cache=COMPILED)
        patch.setattr("great_expectations.render.view.view.Environment", kept)
        yield
