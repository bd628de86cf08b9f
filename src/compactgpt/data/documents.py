"""Define a corpus and its documents; write and read shards, the parquet files of documents.

A row group of a shard has about 2 MiB of text, or one longer document.
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
SHARD_BYTES = 2**28  # UTF-8 bytes of text in a shard
ROW_GROUP_BYTES = 2**21  # UTF-8 bytes of text in a row group


class Part(NamedTuple):
    """A part of a corpus: a Python distribution, a file pattern, or a split of a data set."""

    name: str
    version: str | None = None
    licence: str | None = None


class Text(NamedTuple):
    """One text of a corpus, before `download` leaves out empty, short, long and repeated texts."""

    text: str
    source: str
    part: int  # index in `Corpus.parts`
    position: Any  # a JSON value; `Corpus.read(position)` yields the texts after this text
    cut: str = ""  # where the file of this text was cut, such as "blank lines"; empty for a complete file


@dataclass(frozen=True)
class Corpus:
    """The texts of a corpus, with a function that reads the texts from any position."""

    name: str  # the value of `download.corpus` in params.yaml
    identity: Any  # settings and files that determine the texts (JSON); after a change, `download` restarts
    parts: Sequence[Part]  # in the order in which `read` yields their texts
    read: Callable[[Any], Iterator[Text]]  # yields the texts after a `Text.position`, or all texts for None
    lengths: range = range(1, 2**62)  # allowed lengths of a text, in characters


class Document(NamedTuple):
    """A text with its id and its source, as a shard stores it."""

    id: str  # first 16 bytes of the SHA-256 of the text in UTF-8, as 32 hex digits
    text: str
    source: str  # where the text came from, such as `scipy/scipy.stats._stats_py` or `corpus/a.jsonl:12`


class RowGroup(NamedTuple):
    """One row group of a shard: the unit in which documents are read."""

    path: Path  # path of the shard
    number: int  # number of the row group in the shard, from 0


def new_document(text: str, source: str) -> Document:
    """Create a document from a text.

    Raises BadData if the text has a lone surrogate, which UTF-8 can't encode.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData(
            f"{source}: character {error.start + 1:,} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is not valid Unicode: correct or remove the document"
        ) from error
    return Document(hashlib.sha256(content).hexdigest()[:32], text, source)


def check_size(size: int, what: str, key: str, megabytes: int) -> None:
    """Raise BadData about `what` if its `size` (bytes or characters) is over the limit `download.{key}`."""
    if size > megabytes * MEGABYTE:
        raise BadData(
            f"{what} is longer than {megabytes:,} MB (download.{key}): cut it into documents, remove it, or "
            "raise the limit"
        )


def text_of_row(row: Any, where: str, column: str, key: str) -> str:
    """Return the text of a row: the value in its `column`, or the row itself if the row is a string.

    Raises BadData if the row has no text; the message names `key`, the section of params.yaml that has the
    setting `text_column`.
    """
    text = row.get(column) if isinstance(row, dict) else row
    if isinstance(text, str):
        return text
    found = type(text).__name__
    if isinstance(row, dict) and column not in row:
        found = f"columns {sorted(row)[:8]}"
    raise BadData(
        f"{where}: found {found}, expected text in the column {column!r}: correct or remove the row, or set "
        f"{key}.text_column in params.yaml"
    )


# --- writing


def write_shards(
    folder: Path, documents: Iterable[Document], shard_bytes: int = SHARD_BYTES, first: int = 0
) -> Iterator[Path]:
    """Write documents into shards in `folder`; yield the path of each complete shard.

    A shard is complete when its text has at least `shard_bytes`. `first` is the number of the first shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # `part` is unused. Removing this column would change the hash of every corpus.
    types = {"id": pa.string(), "text": pa.string(), "source": pa.string(), "part": pa.int32()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    # Ids and texts do not repeat, so a dictionary of their values saves no space.
    options = {"compression": "zstd", "use_dictionary": ["source"], "write_page_checksum": True}
    stream = iter(documents)
    for number in count(first):
        missing = shard_bytes  # bytes of text that the shard still needs
        group, size = _take(stream, min(ROW_GROUP_BYTES, missing))
        if not group:
            return
        path = folder / f"documents-{number:05d}.parquet"
        with atomic_file(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
            while group:
                rows = [{**document._asdict(), "part": 0} for document in group]
                writer.write_table(pa.Table.from_pylist(rows, schema))
                missing -= size
                group, size = _take(stream, min(ROW_GROUP_BYTES, missing))
        # `documents` has been read exactly to the end of this shard: if the caller stores this position now,
        # a resumed `download` starts with the first document of the next shard.
        yield path


def _take(documents: Iterator[Document], min_bytes: int) -> tuple[list[Document], int]:
    """Take documents until they have `min_bytes` of text; return them and the size of their text."""
    group: list[Document] = []
    size = 0
    # Test the size before `next`, so that a full group takes no further document.
    while size < min_bytes and (document := next(documents, None)) is not None:
        group.append(document)
        size += len(document.text.encode("utf-8"))
    return group, size


# --- reading


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as shard:
            yield shard
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise BadData(f"{path} is damaged ({error}): run `dvc repro -f download`") from error


def row_groups(folder: Path) -> list[RowGroup]:
    """Return the row groups of all shards in a folder, in document order."""
    groups = []
    for path in sorted(folder.glob("documents-*.parquet")):
        with _open_shard(path) as shard:
            groups += [RowGroup(path, number) for number in range(shard.num_row_groups)]
    return groups


def _read(group: RowGroup, *columns: str) -> Iterator[tuple[Any, ...]]:
    with _open_shard(group.path) as shard:
        # Without threads: the callers already read in several processes.
        table = shard.read_row_group(group.number, columns=list(columns), use_threads=False)
        table.validate(full=True)  # raises ArrowInvalid, for example if a text is not UTF-8
        return zip(*(table.column(name).to_pylist() for name in columns), strict=True)


def read_row_group(group: RowGroup) -> list[Document]:
    """Return the documents of a row group."""
    return [Document(*row) for row in _read(group, "id", "text", "source")]


def read_names(group: RowGroup) -> list[tuple[str, str]]:
    """Return (id, source) of each document of a row group; the texts are not read."""
    return [(document_id, source) for document_id, source in _read(group, "id", "source")]
