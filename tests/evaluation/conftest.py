import pytest

from tests.support.tiny_models import save_split, save_tokenizer, tiny_gpt


@pytest.fixture
def encoding(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def split(tmp_path, encoding):
    return save_split(tmp_path / "val.tokens", encoding)


@pytest.fixture
def model(encoding):
    return tiny_gpt(encoding.n_vocab)
