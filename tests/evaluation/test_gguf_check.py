"""A GGUF file that claims more than it holds is refused at once, before the library `gguf` believes it."""

import struct

import pytest

from compactgpt.common.errors import BadData
from compactgpt.evaluation import baselines, gguf_check
from compactgpt.evaluation.gguf_check import check_gguf
from tests.support.tiny_models import save_gguf

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def header(tensors, entries):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


def text(content):
    return struct.pack("<Q", len(content)) + content


def array(kind, count):
    return struct.pack("<IQ", kind, count)


KEY = text(b"k")
LIARS = {
    "items": header(0, 1) + KEY + struct.pack("<I", ARRAY) + array(UINT32, 2**40),
    "items of strings": header(0, 1) + KEY + struct.pack("<I", ARRAY) + array(STRING, 2**40),
    "entries": header(0, 2**40),
    "tensors": header(2**40, 0),
    "a key": header(0, 1) + struct.pack("<Q", 2**40),
    "a string": header(0, 1) + KEY + struct.pack("<IQ", STRING, 2**63),
    "dimensions": header(1, 0) + text(b"t" * 20) + struct.pack("<I", 2**31),
}


@pytest.mark.parametrize("what", LIARS)
def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, what):
    """The library is busy with these for ever, or for minutes."""
    (tmp_path / "x.gguf").write_bytes(LIARS[what])
    with pytest.raises(BadData, match=r"x\.gguf is not a complete GGUF file \(byte .* delete it"):
        baselines.read_gguf(tmp_path / "x.gguf")


def test_arrays_in_arrays_are_refused_by_their_depth(tmp_path):
    path = tmp_path / "x.gguf"
    for depth, allowed in [(3, True), (3000, False)]:
        nested = array(ARRAY, 1) * depth + array(UINT32, 0)
        path.write_bytes(header(0, 1) + KEY + struct.pack("<I", ARRAY) + nested)
        if allowed:
            check_gguf(path)
            continue
        with pytest.raises(BadData, match="arrays nested more than 4 deep"):
            baselines.read_gguf(path)


def test_items_are_bounded_though_the_file_holds_them(tmp_path, monkeypatch):
    """The library makes a numpy array of every item, a hundred bytes for one."""
    path = tmp_path / "x.gguf"
    path.write_bytes(header(0, 1) + KEY + struct.pack("<I", ARRAY) + array(UINT8, 1000) + bytes(1000))
    check_gguf(path)
    monkeypatch.setattr(gguf_check, "_MAX_ITEMS", 999)
    with pytest.raises(BadData, match="claims 1,000 items, 999 are allowed"):
        check_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 9, b"GGUF" + bytes(20), header(0, 1)])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BadData, match="not a complete GGUF file"):
        baselines.read_gguf(tmp_path / "x.gguf")


def test_a_whole_file_passes_and_every_beginning_of_its_header_is_refused(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf")
    check_gguf(path)
    content = path.read_bytes()
    for length in range(0, 600, 7):
        path.write_bytes(content[:length])
        with pytest.raises(BadData, match=r"tiny\.gguf is not a complete GGUF file"):
            check_gguf(path)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf")
    key = b"llama.block_count"
    content = bytearray(path.read_bytes())
    place = content.index(key) + len(key) + 4
    content[place : place + 4] = struct.pack("<I", 10**9)
    path.write_bytes(content)
    with pytest.raises(BadData, match="1,000,000,000 layers of"):
        baselines.read_gguf(path)
