"""Check that a GGUF file holds what its counts claim, before the library `gguf` reads it.

The library believes every count: 49 bytes that claim 2^40 items keep it busy for ever, and nested arrays
end in a RecursionError. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

from compactgpt.common.errors import BadData

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a scalar, by type
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = (
    2**21
)  # of all arrays together: each becomes a numpy array; the largest vocabularies have a million
_MAX_DEPTH = 4  # of arrays in arrays; the models that we read have none in another
_MAX_DIMENSIONS = 8
_SMALLEST_ENTRY = 8 + 4 + 1  # key's length, type, value
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # name's length, dimensions, type, offset


def check_gguf(path: Path) -> None:
    """Walk the header of a GGUF file, whose every count is bounded by the bytes that are left.

    Raises:
        BadData: it is no GGUF file, or it claims more than it holds.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()
    except (ValueError, struct.error) as error:  # an empty file can't be mapped
        raise BadData(f"{path} is no whole GGUF file ({error}): delete it and run again") from error


class _Header:
    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._position, self._order = content, 0, "<"
        self._items = 0

    def check(self) -> None:
        """Read everything before the tensors' own bytes."""
        if self._content[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._position = 4
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine with the other order of bytes
            self._order, self._position = ">", 4
            version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, {_VERSIONS} can be read")
        tensors, entries = self._number("Q"), self._number("Q")
        for _ in self._items_of(entries, _SMALLEST_ENTRY):
            self._string()
            self._value(self._number("I"), _MAX_DEPTH)
        for _ in self._items_of(tensors, _SMALLEST_TENSOR):
            self._tensor()

    def _number(self, kind: str) -> int:
        value = struct.unpack_from(self._order + kind, self._content, self._position)[0]
        self._position += struct.calcsize(kind)
        return int(value)

    def _possible(self, count: int, size: int) -> int:
        """Return a count of items of at least `size` bytes each, if so many fit into the rest of the file."""
        left = len(self._content) - self._position
        if count * size > left:
            raise ValueError(f"byte {self._position:,} claims {count:,} items, {left:,} bytes are left")
        return count

    def _items_of(self, count: int, size: int) -> range:
        """Count items that the library keeps one by one, of at least `size` bytes each."""
        self._items += self._possible(count, size)
        if self._items > _MAX_ITEMS:
            raise ValueError(f"byte {self._position:,} claims {count:,} items, {_MAX_ITEMS:,} are allowed")
        return range(count)

    def _skip(self, count: int, size: int) -> None:
        self._position += self._possible(count, size) * size

    def _string(self) -> None:
        self._skip(self._number("Q"), 1)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._skip(1, _SIZES[kind])
        elif kind == _STRING:
            self._string()
        elif kind != _ARRAY:
            raise ValueError(f"byte {self._position:,} has a value of unknown type {kind}")
        elif not depth:
            raise ValueError(f"byte {self._position:,} has arrays nested more than {_MAX_DEPTH} deep")
        else:
            self._array(depth)

    def _array(self, depth: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        # A string or an array begins with its length, of 8 bytes.
        items = self._items_of(count, _SIZES.get(kind, 8))
        if kind in _SIZES:
            self._skip(count, _SIZES[kind])
            return
        for _ in items:
            self._value(kind, depth - 1)

    def _tensor(self) -> None:
        self._string()
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"byte {self._position:,} has a tensor of {dimensions:,} dimensions")
        self._skip(dimensions, 8)
        self._skip(1, 4 + 8)  # type, offset
