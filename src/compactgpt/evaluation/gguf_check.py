"""Check that a GGUF file has as many items as its header states, before the library `gguf` reads the file.

The library trusts every count: a file of 49 bytes that states 2^40 items runs without end, and nested arrays
raise a RecursionError. Layout of the file: github.com/ggml-org/ggml, docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

from compactgpt.common.errors import BadData

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each scalar type
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 2**21  # items in the complete file; the largest vocabularies have a million tokens
_MAX_DEPTH = 4  # levels of nested arrays; the GGUF models of params.yaml have no nested arrays


def check_gguf(path: Path) -> None:
    """Read the header of a GGUF file and compare every count with the bytes that are left in the file.

    Raises:
        BadData: the file is not a GGUF file, or a count needs more bytes than the file has.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _HeaderReader(content).read()
    except (ValueError, struct.error) as error:  # ValueError: also an empty file, which can't be mapped
        raise BadData(f"{path} is not a complete GGUF file ({error}): delete it and run again") from error


class _HeaderReader:
    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._position, self._items = content, 0, 0

    def read(self) -> None:
        """Read the file up to the data of the tensors."""
        magic, version = self._number("I"), self._number("I")
        if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
            raise ValueError(f"it begins with {self._content[:8]!r}; allowed: GGUF and version 2 or 3")
        tensors, entries = self._number("Q"), self._number("Q")
        for _ in self._count_items(entries, 8 + 4 + 1):  # length of the key, type, value
            self._skip(self._number("Q"), 1)
            self._skip_value(self._number("I"), _MAX_DEPTH)
        for _ in self._count_items(tensors, 8 + 4 + 4 + 8):  # length of the name, dimensions, type, offset
            self._skip(self._number("Q"), 1)
            self._skip(self._number("I"), 8)
            self._skip(1, 4 + 8)

    def _number(self, kind: str) -> int:
        value = struct.unpack_from("<" + kind, self._content, self._position)[0]
        self._position += struct.calcsize("<" + kind)
        return int(value)

    def _skip(self, count: int, size: int) -> None:
        left = len(self._content) - self._position
        if count * size > left:
            raise ValueError(
                f"byte {self._position:,} claims {count:,} items, but only {left:,} bytes are left"
            )
        self._position += count * size

    def _count_items(self, count: int, size: int) -> range:
        """Return range(count) after checking the limits.

        The library makes an object for each item, so their total number is limited, too.

        Args:
            count: the number of items that the file states.
            size: the smallest size of an item, in bytes.
        """
        start = self._position
        self._skip(count, size)  # raises ValueError if the items can't fit
        self._position = start
        self._items += count
        if self._items > _MAX_ITEMS:
            raise ValueError(f"byte {self._position:,} claims {count:,} items, {_MAX_ITEMS:,} are allowed")
        return range(count)

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._skip(1, _SIZES[kind])
        elif kind == _STRING:
            self._skip(self._number("Q"), 1)
        elif kind != _ARRAY:
            raise ValueError(f"byte {self._position:,} has a value of unknown type {kind}")
        elif not depth:
            raise ValueError(f"byte {self._position:,} has arrays nested more than {_MAX_DEPTH} deep")
        else:
            kind, count = self._number("I"), self._number("Q")
            # A string or an array has at least the 8 bytes of its length.
            for _ in self._count_items(count, _SIZES.get(kind, 8)):
                self._skip_value(kind, depth - 1)
