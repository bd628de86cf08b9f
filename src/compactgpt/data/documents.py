"""Documents on disk: zstd parquet shards of (id, text, source, part), cut by size, read by row group.

    id      first 16 bytes of the SHA-256 of the document's UTF-8 text, as 32 hex digits
    text    the document, whole
    source  where it came from, such as `scipy/scipy.stats._stats_py` or `corpus/a.jsonl:12`
    part    always 0

A reader's unit of work is a row group: a few MiB of text, or one document where that is longer. The folder
is made by `storage.atomic_folder`, so that its manifest names each shard's size and SHA-256.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from compactgpt.common.errors import BadData
from compactgpt.common.storage import atomic_file

SHARD_BYTES = 2**28  # of text, where params.yaml (download.shard_megabytes) says nothing else
ROW_GROUP_BYTES = 2**21  # of text
_COLUMNS = ("id", "text", "source", "part")
_RECENT_IDS = 2**18


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One readable unit of a shard: a row group of whole documents."""

    path: Path
    index: int


def new_document(text: str, source: str) -> Document:
    """Name a text by its hash.

    Raises:
        BadData: the text holds a lone surrogate, which UTF-8 can't spell.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData(
            f"{source}: character {error.start + 1:,} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is no Unicode text: mend or remove the document"
        ) from error
    return Document(hashlib.sha256(content).hexdigest()[:32], text, source)


# --- writing


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"documents-{number:05d}.parquet"


def write_documents(folder: Path, documents: Iterable[Document], shard_bytes: int = SHARD_BYTES) -> None:
    """Write shards `documents-00000.parquet`, ... into `folder`, in memory bounded by a row group.

    The cuts depend on the documents alone.
    """
    stream = iter(documents)
    for number in count():
        if not write_shard(folder / shard_name(number), stream, shard_bytes):
            return


def write_shard(path: Path, documents: Iterator[Document], shard_bytes: int) -> int:
    """Take documents until they have `shard_bytes` of text, and not one more, and write them as a shard.

    Returns:
        How many were taken; where none was left there is no file.
    """
    groups = _groups(documents, shard_bytes)
    first = next(groups, None)
    if first is None:
        return 0
    with atomic_file(path) as file:
        return _write_groups(file, first, groups)


def _groups(documents: Iterator[Document], shard_bytes: int) -> Iterator[list[Document]]:
    """Yield the documents of one row group after another: of ROW_GROUP_BYTES of text or a little more."""
    group: list[Document] = []
    total = waiting = 0
    while total < shard_bytes and (document := next(documents, None)) is not None:
        size = len(document.text.encode("utf-8"))
        total += size
        waiting += size
        group.append(document)
        if waiting >= ROW_GROUP_BYTES:
            yield group
            group, waiting = [], 0
    if group:
        yield group


def _write_groups(file: IO[bytes], first: list[Document], groups: Iterator[list[Document]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(_COLUMNS, pa.string()) | {"part": pa.int32()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    taken = 0
    with pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=["source"], write_page_checksum=True
    ) as writer:
        for group in chain([first], groups):
            columns = zip(*((each.id, each.text, each.source, 0) for each in group), strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            taken += len(group)
    return taken


# --- reading


def row_groups(folder: Path) -> list[RowGroup]:
    """List the row groups of a folder of shards, in the order of its documents.

    Raises:
        BadData: a shard was made by another version of this program, or is damaged.
    """
    return [group for path in sorted(folder.glob("documents-*.parquet")) for group in _row_groups(path)]


def _row_groups(path: Path) -> list[RowGroup]:
    import pyarrow.parquet as pq

    with _named_damage(str(path)):
        metadata = pq.read_metadata(path)
    names = tuple(metadata.schema.names)
    if names != _COLUMNS:
        raise BadData(
            f"{path} has columns {list(names)}, {list(_COLUMNS)} are wanted: run `dvc repro -f download`"
        )
    numbers = range(metadata.num_row_groups)
    if any(metadata.row_group(number).column(3).statistics.max for number in numbers):
        raise BadData(
            f"{path} has documents in parts, as an earlier version wrote them: run `dvc repro -f download`"
        )
    return [RowGroup(path, number) for number in numbers]


@contextmanager
def _named_damage(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise BadData(f"{what} is damaged ({error}): run `dvc repro -f download`") from error


def _read(group: RowGroup, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet as pq

    with (
        _named_damage(f"{group.path}, row group {group.index},"),
        pq.ParquetFile(group.path, page_checksum_verification=True) as file,
    ):
        table = file.read_row_group(group.index, columns=list(columns), use_threads=False)
        table.validate(full=True)  # UTF-8, among others
    return table


def read_row_group(group: RowGroup) -> list[Document]:
    """Read the documents of a row group.

    Raises:
        BadData: the shard is damaged.
    """
    table = _read(group, ("id", "text", "source"))
    columns = [table.column(name).to_pylist() for name in ("id", "text", "source")]
    return [Document(*row) for row in zip(*columns, strict=True)]


def read_texts(group: RowGroup) -> Iterator[tuple[str, str, memoryview]]:
    """Yield (id, source, text in UTF-8) of the documents of a row group, without a Python string or a copy.

    Raises:
        BadData: the shard is damaged.
    """
    table = _read(group, ("id", "text", "source"))
    ids, sources = (table.column(name).to_pylist() for name in ("id", "source"))
    yield from zip(ids, sources, _cells(table.column("text")), strict=True)


def _cells(column: Any) -> Iterator[memoryview]:
    for chunk in column.chunks:
        _, offsets, content = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        view = memoryview(content if content is not None else b"")
        for start, end in pairwise(ends):
            yield view[start:end]


def read_names(group: RowGroup) -> list[tuple[str, str]]:
    """Read id and source of the documents of a row group, without their texts."""
    table = _read(group, ("id", "source"))
    return list(zip(*(table.column(name).to_pylist() for name in ("id", "source")), strict=True))


def read_ids(path: Path) -> list[str]:
    """Read the ids of the documents of one shard, in order, without their texts."""
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["id"]).column("id").to_pylist())


class IdSet:
    """Which ids were met before: exact, in 16 bytes a document (a Python set takes a hundred).

    The newest ids are in a set; when that is full it is merged into one sorted array. Merging holds the
    array twice for a moment: 8 million documents are 128 MB, 256 MB then.
    """

    def __init__(self, recent: int = _RECENT_IDS) -> None:
        self._limit = recent
        self._recent: set[bytes] = set()
        # numpy compares these as if padded with zero bytes to 16, and strips such bytes from what it gives.
        self._sorted = np.empty(0, "S16")

    def add(self, document_id: str) -> bool:
        """Take an id (32 hex digits); tell whether it is new."""
        key = bytes.fromhex(document_id)
        if key in self._recent:
            return False
        place = int(np.searchsorted(self._sorted, np.array(key, "S16")))
        if place < len(self._sorted) and self._sorted[place] == key.rstrip(b"\0"):
            return False
        self._recent.add(key)
        if len(self._recent) == self._limit:
            both = np.concatenate([self._sorted, np.array(sorted(self._recent), "S16")])
            both.sort(kind="stable")  # two sorted runs
            self._sorted, self._recent = both, set()
        return True
