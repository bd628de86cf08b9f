"""A GGUF file that claims more than it holds is refused at once, before the library `gguf` trusts it."""

import struct

import pytest

from compactgpt.common.errors import BadData
from compactgpt.evaluation import gguf_check
from compactgpt.evaluation.baselines import read_gguf
from compactgpt.evaluation.gguf_check import check_gguf
from tests.support.tiny_models import save_gguf

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def header(tensors, entries):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


def text(content):
    return struct.pack("<Q", len(content)) + content


def array(kind, count):
    return struct.pack("<IQ", kind, count)


ENTRY = header(0, 1) + text(b"k")


@pytest.mark.parametrize(
    "content",
    [
        ENTRY + struct.pack("<I", ARRAY) + array(UINT32, 2**40),
        ENTRY + struct.pack("<I", ARRAY) + array(STRING, 2**40),
        header(0, 2**40),
        header(2**40, 0),
        header(0, 1) + struct.pack("<Q", 2**40),  # a key
        ENTRY + struct.pack("<IQ", STRING, 2**63),
        header(1, 0) + text(b"t" * 20) + struct.pack("<I", 2**31),  # dimensions
        ENTRY + struct.pack("<I", 77) + bytes(50),
        b"", b"GGUF", b"not a model" * 9, b"GGUF" + bytes(20), header(0, 1),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, content):
    """The library is busy with the first of these without end, or for minutes."""
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BadData, match=r"x\.gguf is not a complete GGUF file .* delete it"):
        read_gguf(tmp_path / "x.gguf")


def test_nested_arrays_and_the_number_of_items_are_bounded(tmp_path, monkeypatch):
    path, array_entry = tmp_path / "x.gguf", ENTRY + struct.pack("<I", ARRAY)
    path.write_bytes(array_entry + array(ARRAY, 1) * 3 + array(UINT32, 0))
    check_gguf(path)
    path.write_bytes(array_entry + array(ARRAY, 1) * 3000 + array(UINT32, 0))
    with pytest.raises(BadData, match="arrays nested more than 4 deep"):
        check_gguf(path)
    path.write_bytes(array_entry + array(UINT8, 1000) + bytes(1000))
    check_gguf(path)
    monkeypatch.setattr(gguf_check, "_MAX_ITEMS", 999)
    with pytest.raises(BadData, match="claims 1,000 items, 999 are allowed"):
        check_gguf(path)


def test_a_complete_file_passes_and_every_beginning_of_its_header_is_refused(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf")
    check_gguf(path)
    content = path.read_bytes()
    for length in range(0, 600, 7):
        path.write_bytes(content[:length])
        with pytest.raises(BadData, match=r"tiny\.gguf is not a complete GGUF file"):
            check_gguf(path)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path):
    path, key = save_gguf(tmp_path / "tiny.gguf"), b"llama.block_count"
    before, after = path.read_bytes().split(key)
    path.write_bytes(before + key + after[:4] + struct.pack("<I", 10**9) + after[8:])
    with pytest.raises(BadData, match="1,000,000,000 layers of"):
        read_gguf(path)
