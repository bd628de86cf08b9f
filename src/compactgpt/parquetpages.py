"""The pages of a parquet column, looked at before they are read: a page is unpacked whole, whatever it holds.

What we want to know lies in structs of Thrift's compact protocol (apache/thrift's
doc/specs/thrift-compact-protocol.md), whose fields apache/parquet-format's src/main/thrift/parquet.thrift
numbers. pyarrow tells of the file's end too, but ends the process where statistics contradict the schema.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import IO, Any

_HEADER_BYTES = 2**16  # that are read for one header; statistics make up most of it
_DATA_PAGES = (5, 8)  # fields of PageHeader with the header of a data page, version 1 and 2
_END_BYTES = 8  # FileMetaData's length and PAR1


def column_chunks(file: IO[bytes], column: str) -> list[tuple[int, int]]:
    """Return where the pages of a column begin and end, in bytes, in each group of rows.

    Args:
        file: a parquet file that pyarrow opens.
        column: the name of a column that is not nested.

    Raises:
        ValueError: the file's end is damaged, or a group has no such column.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_BYTES))
    length = int.from_bytes(file.read(_END_BYTES)[:4], "little")
    file.seek(max(0, size - _END_BYTES - length))
    with _refused("the file's end is damaged"):
        metadata, _ = _struct(file.read(length), 0)
        found = [_chunk(group[1], column) for group in metadata[4]]
    if not all(0 <= start <= end <= size for start, end in found):
        raise ValueError("the file's end names places beyond it")
    return found


def _chunk(chunks: list[Any], column: str) -> tuple[int, int]:
    for chunk in (each[3] for each in chunks):
        if chunk[3] == [column.encode()]:
            start, dictionary = index(chunk[9]), index(chunk.get(11, 0))
            if 0 < dictionary < start:  # some writers name a dictionary at 0 where there is none
                start = dictionary
            return start, start + index(chunk[7])
    raise ValueError(f"a group of rows has no {column!r}")


def page_sizes(file: IO[bytes], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (bytes unpacked, rows) of each page between two places of a file; a dictionary has no rows.

    Raises:
        ValueError: a header is none.
    """
    place = start
    while place < end:
        file.seek(place)
        with _refused(f"no page at byte {place:,}"):
            fields, length = _struct(file.read(_HEADER_BYTES), 0)
            unpacked, packed = index(fields[2]), index(fields[3])
            rows = sum(index(fields[number][1]) for number in _DATA_PAGES if number in fields)
        if min(unpacked, packed, rows) < 0:
            raise ValueError(f"the page at byte {place:,} has sizes below 0")
        yield unpacked, rows
        place += length + packed


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Name what of a struct is missing, of another type, or endless."""
    try:
        yield
    except (IndexError, KeyError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(what) from error


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
    """Read a struct: its fields by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[place]:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _signed(data, place)
        fields[number], place = _value(data, place, head & 15)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, place
    if kind in (4, 5, 6):  # integers of 16, 32, 64 bits
        return _signed(data, place)
    if kind == 8:  # bytes
        length, place = _unsigned(data, place)
        return data[place : place + length], place + length
    if kind in (9, 10):
        return _list(data, place)
    if kind == 12:
        return _struct(data, place)
    raise TypeError(f"parquet has no field of type {kind}")


def _list(data: bytes, place: int) -> tuple[list[Any], int]:
    length, kind = data[place] >> 4, data[place] & 15
    place += 1
    if length == 15:
        length, place = _unsigned(data, place)
    found = []
    for _ in range(length):
        if kind in (1, 2):  # in a list each has a byte of its own
            value, place = data[place] == 1, place + 1
        else:
            value, place = _value(data, place, kind)
        found.append(value)
    return found, place


def _signed(data: bytes, place: int) -> tuple[int, int]:
    value, place = _unsigned(data, place)
    return value >> 1 ^ -(value & 1), place


def _unsigned(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
