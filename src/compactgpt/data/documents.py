"""Documents: where they come from, and how they are stored.

A `Corpus` yields texts. The `download` stage stores them as zstd parquet shards with these columns:

    id      first 16 bytes of the SHA-256 of the document's UTF-8 text, as 32 hex digits
    text    the complete document
    source  where it came from, such as `scipy/scipy.stats._stats_py` or `corpus/a.jsonl:12`
    part    always 0

Readers take one row group at a time: a few MiB of text, or one document if that is longer.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from compactgpt.common.errors import BadData
from compactgpt.common.storage import atomic_file

MEGABYTE = 1_000_000
SHARD_BYTES = 2**28  # of text
ROW_GROUP_BYTES = 2**21  # of text


class Part(NamedTuple):
    """A part of a corpus, as reports name it: a distribution, a file pattern or a split."""

    name: str
    version: str | None = None
    licence: str | None = None


class Text(NamedTuple):
    """One text of a corpus, before short, long and repeated ones are left out."""

    text: str
    source: str
    part: int  # index in `Corpus.parts`
    position: Any  # JSON value; `Corpus.read(position)` resumes right after this text


@dataclass(frozen=True)
class Corpus:
    """Texts from one kind of source, which can be read from any position.

    Attributes:
        name: as params.yaml spells it.
        identity: JSON value that changes when the texts may have changed.
        parts: read one after another, in this order.
        read: yields the texts after a position; all texts after None.
        lengths: allowed lengths of a text, in characters.
    """

    name: str
    identity: Any
    parts: Sequence[Part]
    read: Callable[[Any], Iterator[Text]]
    lengths: range = range(1, 2**62)


@dataclass(frozen=True, slots=True)
class Document:
    """One stored text."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a shard: the unit that readers take."""

    path: Path
    index: int


def new_document(text: str, source: str) -> Document:
    """Return the document of a text, with the hash of the text as its id.

    Raises:
        BadData: the text has a lone surrogate, which UTF-8 can't encode.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData(
            f"{source}: character {error.start + 1:,} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is not valid Unicode: correct or remove the document"
        ) from error
    return Document(hashlib.sha256(content).hexdigest()[:32], text, source)


# --- writing


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"documents-{number:05d}.parquet"


def write_documents(folder: Path, documents: Iterable[Document], shard_bytes: int = SHARD_BYTES) -> None:
    """Write documents as shards into `folder`; see `write_shard`."""
    stream = iter(documents)
    for number in count():
        if not write_shard(folder / shard_name(number), stream, shard_bytes):
            return


def write_shard(path: Path, documents: Iterator[Document], shard_bytes: int) -> bool:
    """Write one shard of at least `shard_bytes` of text, or of all documents that are left.

    No document after the last one of the shard is taken. Memory holds one row group.

    Returns:
        Whether a shard was written: False if no document was left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    group, size = _take(documents, min(ROW_GROUP_BYTES, shard_bytes))
    if not group:
        return False
    # `part` has no use any more; without it the hash of every corpus would change.
    types = {"id": pa.string(), "text": pa.string(), "source": pa.string(), "part": pa.int32()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    # Ids and texts do not repeat, so a dictionary would only add to them.
    options = {"compression": "zstd", "use_dictionary": ["source"], "write_page_checksum": True}
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        while group:
            rows = [{"id": each.id, "text": each.text, "source": each.source, "part": 0} for each in group]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            shard_bytes -= size  # what is left to fill
            group, size = _take(documents, min(ROW_GROUP_BYTES, shard_bytes))
    return True


def _take(documents: Iterator[Document], min_bytes: int) -> tuple[list[Document], int]:
    """Take documents until they have `min_bytes` of text; return them and the bytes of their text."""
    group: list[Document] = []
    size = 0
    # The size is tested before `next`: a full group takes no further document.
    while size < min_bytes and (document := next(documents, None)) is not None:
        group.append(document)
        size += len(document.text.encode("utf-8"))
    return group, size


# --- reading


@contextmanager
def _damage_as_bad_data(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise BadData(f"{what} is damaged ({error}): run `dvc repro -f download`") from error


def row_groups(folder: Path) -> list[RowGroup]:
    """List the row groups of a folder of shards, in the order of its documents.

    Raises:
        BadData: a shard is damaged.
    """
    import pyarrow.parquet as pq

    groups = []
    for path in sorted(folder.glob("documents-*.parquet")):
        with _damage_as_bad_data(str(path)):
            number = pq.read_metadata(path).num_row_groups
        groups += [RowGroup(path, index) for index in range(number)]
    return groups


def _read(group: RowGroup, *columns: str) -> Any:
    import pyarrow.parquet as pq

    with (
        _damage_as_bad_data(f"{group.path}, row group {group.index},"),
        pq.ParquetFile(group.path, page_checksum_verification=True) as file,
    ):
        # Without threads: the callers read in several processes.
        table = file.read_row_group(group.index, columns=list(columns), use_threads=False)
        table.validate(full=True)  # checks that texts are UTF-8, among others
        return table.select(columns)


def read_row_group(group: RowGroup) -> list[Document]:
    """Read the documents of a row group.

    Raises:
        BadData: the shard is damaged.
    """
    columns = [column.to_pylist() for column in _read(group, "id", "text", "source").columns]
    return [Document(*row) for row in zip(*columns, strict=True)]


def read_names(group: RowGroup) -> list[tuple[str, str]]:
    """Read (id, source) of each document of a row group, without the texts."""
    ids, sources = _read(group, "id", "source").columns
    return list(zip(ids.to_pylist(), sources.to_pylist(), strict=True))


def read_ids(path: Path) -> list[bytes]:
    """Read the ids of the documents of a shard, 16 bytes each, in order, without the texts."""
    import pyarrow.parquet as pq

    return [bytes.fromhex(each) for each in pq.read_table(path, columns=["id"]).column("id").to_pylist()]
