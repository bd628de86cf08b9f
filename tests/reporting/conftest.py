"""The inputs of a comparison as files, and the record that is made of them."""

import pytest

from tests.support.comparison_inputs import make_place, record_of


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return record_of(make_place(tmp_path_factory.mktemp("place")))
