"""The pages of a parquet column, looked at before they are read: a page is unpacked whole, whatever it holds.

A page's header is a struct in Thrift's compact protocol (PageHeader in apache/parquet-format's
src/main/thrift/parquet.thrift; apache/thrift's doc/specs/thrift-compact-protocol.md). Of it we take fields
2 and 3, the sizes unpacked and packed, and field 1 of the data page's own header, its number of rows.
"""

from collections.abc import Iterator
from typing import IO, Any

_HEADER_BYTES = 2**16  # that are read for one header; statistics make up most of it
_DATA_PAGES = (5, 8)  # fields with the header of a data page, version 1 and 2


def page_sizes(file: IO[bytes], chunk: Any) -> Iterator[tuple[int, int]]:
    """Yield (bytes unpacked, rows) of each page of a column chunk; a dictionary has no rows.

    Args:
        file: the parquet file.
        chunk: its pyarrow.parquet.ColumnChunkMetaData.

    Raises:
        ValueError: a header is none.
    """
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    place, end = start, start + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        try:
            fields, length = _struct(file.read(_HEADER_BYTES), 0)
            unpacked, packed = int(fields[2]), int(fields[3])
            rows = sum(int(fields[number][1]) for number in _DATA_PAGES if number in fields)
        except (IndexError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"no page at byte {place:,}") from error
        if min(unpacked, packed, rows) < 0:
            raise ValueError(f"the page at byte {place:,} has sizes below 0")
        yield unpacked, rows
        place += length + packed


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
        return None, place + length
    if kind == 12:
        return _struct(data, place)
    raise ValueError(f"no page header has a field of type {kind}")


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
