"""Documents on disk: zstd parquet shards of (id, text, source), cut by size, read by row group.

    id      first 16 bytes of the SHA-256 of the UTF-8 text, as 32 hex digits
    text    the document
    source  where it came from, such as `scipy/scipy.stats._stats_py` or `corpus/a.jsonl:12`

A row group is the unit of work of every reader: a few MiB of text, or one document if that is longer.
The folder is made by `storage.atomic_folder`, so that its manifest names each shard's size and SHA-256.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from compactgpt.errors import BadData
from compactgpt.storage import atomic_file

SHARD_BYTES = 2**28  # of text, where params.yaml (download.shard_megabytes) says nothing else
ROW_GROUP_BYTES = 2**21  # of text
_RECENT_IDS = 2**18


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One readable piece of a shard."""

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
    first, size = _take(documents, min(shard_bytes, ROW_GROUP_BYTES))
    if not first:
        return 0
    with atomic_file(path) as file:
        return _write_groups(file, first, size, documents, shard_bytes)


def _take(documents: Iterator[Document], limit: int) -> tuple[list[Document], int]:
    """The next documents of `limit` bytes of text or a little more, and how many bytes they have."""
    batch: list[Document] = []
    size = 0
    while size < limit and (document := next(documents, None)) is not None:
        batch.append(document)
        size += len(document.text.encode("utf-8"))
    return batch, size


def _write_groups(
    file: IO[bytes], batch: list[Document], size: int, documents: Iterator[Document], shard_bytes: int
) -> int:
    import pyarrow.parquet as pq

    schema, taken = _schema(), 0
    with pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=["source"], write_page_checksum=True
    ) as writer:
        while batch:
            writer.write_table(_table(batch, schema))
            taken += len(batch)
            batch, more = _take(documents, min(shard_bytes - size, ROW_GROUP_BYTES))
            size += more
    return taken


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "text", "source")])


def _table(documents: list[Document], schema: Any) -> Any:
    import pyarrow as pa

    columns = [[getattr(document, name) for document in documents] for name in schema.names]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=schema)


def row_groups(folder: Path) -> list[RowGroup]:
    """List the pieces of a folder of shards, in the order of its documents."""
    import pyarrow.parquet as pq

    return [
        RowGroup(path, index)
        for path in sorted(folder.glob("documents-*.parquet"))
        for index in range(pq.read_metadata(path).num_row_groups)
    ]


def read_row_group(group: RowGroup) -> list[Document]:
    """Read the documents of one piece."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(group.path, page_checksum_verification=True) as file:
        table = file.read_row_group(group.index)
    columns = (table.column(name).to_pylist() for name in ("id", "text", "source"))
    return [Document(*row) for row in zip(*columns, strict=True)]


def read_ids(path: Path) -> list[str]:
    """Read the ids of one shard, in order, without their texts."""
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
