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
from itertools import islice
from pathlib import Path
from typing import Any

from compactgpt.errors import BadData

SHARD_BYTES = 2**28  # of text
ROW_GROUP_BYTES = 2**21  # of text


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


def write_documents(folder: Path, documents: Iterable[Document]) -> None:
    """Write shards `documents-00000.parquet`, ... into `folder`, in memory bounded by a row group.

    The cuts depend on the documents alone.
    """
    groups = _batches(documents)
    for number, first in enumerate(groups):
        _write_shard(folder / f"documents-{number:05d}.parquet", first, groups)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text.encode("utf-8"))
        if size >= ROW_GROUP_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shard(path: Path, first: list[Document], groups: Iterator[list[Document]]) -> None:
    import pyarrow.parquet as pq

    schema = _schema()
    more = islice(groups, SHARD_BYTES // ROW_GROUP_BYTES - 1)
    # Through a Python file, so that a full disk is the OSError that storage.py knows.
    with (
        open(path, "wb") as file,
        pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=["source"], write_page_checksum=True
        ) as writer,
    ):
        writer.write_table(_table(first, schema))
        for batch in more:
            writer.write_table(_table(batch, schema))


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
