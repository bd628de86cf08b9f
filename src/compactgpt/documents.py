"""Documents on disk: zstd parquet shards of (id, text, source, part), cut by size, read by row group.

    id      first 16 bytes of the SHA-256 of the document's UTF-8 text, as 32 hex digits
    text    the document, or PART_BYTES of it at most: a longer one is several rows, one after another
    source  where it came from, such as `scipy/scipy.stats._stats_py` or `corpus/a.jsonl:12`
    part    0, and 1, 2, ... for the further parts of a long document

Parts end between any two characters: who needs more of the text than a part, such as a whole word, carries
the rest over. The unit of work of every reader is a few MiB of text or one long document, whose parts are
row groups of their own: nobody has more of it in memory than one part.
The folder is made by `storage.atomic_folder`, so that its manifest names each shard's size and SHA-256.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from compactgpt.errors import BadData
from compactgpt.storage import atomic_file

SHARD_BYTES = 2**28  # of text, where params.yaml (download.shard_megabytes) says nothing else
ROW_GROUP_BYTES = 2**21  # of text
PART_BYTES = 2**22  # of text; reading a cell of parquet takes more than three times its size
_COLUMNS = ("id", "text", "source", "part")
_RECENT_IDS = 2**18


class LongText:
    """A text that is too long for memory, in a temporary file until it is closed."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._hasher = hashlib.sha256()
        self._characters = self.size = 0

    def add(self, content: bytes, characters: int) -> None:
        """Append UTF-8, which may end within a character."""
        self._file.write(content)
        self._hasher.update(content)
        self.size += len(content)
        self._characters += characters

    def __len__(self) -> int:
        """Length in characters."""
        return self._characters

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def sha256(self) -> str:
        """Hash of the text."""
        return self._hasher.hexdigest()

    def parts(self) -> Iterator[bytes]:
        """Yield the text from its start, in parts of PART_BYTES or a few bytes less."""
        self._file.seek(0)
        yield from _parts(self._file)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    """Cut UTF-8 between characters, so that the cuts depend on the text alone."""
    block = file.read(PART_BYTES + 1)
    while len(block) > PART_BYTES:
        end = PART_BYTES
        while block[end] & 0xC0 == 0x80:  # the middle of a character
            end -= 1
        yield block[:end]
        block = block[end:] + file.read(PART_BYTES + 1 - len(block) + end)
    yield block


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str | LongText
    source: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A document of a shard."""

    id: str
    source: str
    parts: Iterable[memoryview]  # UTF-8, cut between characters; read them before the next document


class Counted:
    """The parts of a text, and how many bytes of them were read."""

    def __init__(self, parts: Iterable[memoryview]) -> None:
        self._parts, self.size = parts, 0

    def __iter__(self) -> Iterator[memoryview]:
        for part in self._parts:
            self.size += len(part)
            yield part


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One readable piece of a shard: a row group of whole documents, or those of one long document."""

    path: Path
    index: int
    parts: int = 1  # row groups from `index` on


def new_document(text: str | LongText, source: str) -> Document:
    """Name a text by its hash.

    Raises:
        BadData: the text holds a lone surrogate, which UTF-8 can't spell.
    """
    if isinstance(text, LongText):
        return Document(text.sha256()[:32], text, source)
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadData(
            f"{source}: character {error.start + 1:,} of the text is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is no Unicode text: mend or remove the document"
        ) from error
    return Document(hashlib.sha256(content).hexdigest()[:32], text, source)


def text_bytes(text: str | LongText) -> int:
    """Length in UTF-8."""
    return text.size if isinstance(text, LongText) else len(text.encode("utf-8"))


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


Row = tuple[str, bytes, str, int]


def _groups(documents: Iterator[Document], shard_bytes: int) -> Iterator[list[Row]]:
    """The rows of one row group after another: ROW_GROUP_BYTES or a little more, long documents apart."""
    rows: list[Row] = []
    total = waiting = 0
    while total < shard_bytes and (document := next(documents, None)) is not None:
        size = text_bytes(document.text)
        total += size
        waiting += size
        if size > PART_BYTES and rows:
            yield rows
            rows = []
        for part, content in enumerate(_text_parts(document.text)):
            rows.append((document.id, content, document.source, part))
            if size > PART_BYTES:
                yield rows
                rows, waiting = [], 0
        if waiting >= ROW_GROUP_BYTES:
            yield rows
            rows, waiting = [], 0
    if rows:
        yield rows


def _text_parts(text: str | LongText) -> Iterator[bytes]:
    return text.parts() if isinstance(text, LongText) else _parts(io.BytesIO(text.encode("utf-8")))


def _write_groups(file: IO[bytes], first: list[Row], groups: Iterator[list[Row]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(_COLUMNS, pa.string()) | {"part": pa.int32()}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])
    taken = 0
    with pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=["source"], write_page_checksum=True
    ) as writer:
        for rows in chain([first], groups):
            columns = zip(*rows, strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            taken += sum(part == 0 for *_, part in rows)
    return taken


# --- reading


def row_groups(folder: Path) -> list[RowGroup]:
    """List the pieces of a folder of shards, in the order of its documents.

    Raises:
        BadData: a shard was made by another version of this program, or is damaged.
    """
    return [group for path in sorted(folder.glob("documents-*.parquet")) for group in _row_groups(path)]


def _row_groups(path: Path) -> Iterator[RowGroup]:
    import pyarrow.parquet as pq

    with _named_damage(str(path)):
        metadata = pq.read_metadata(path)
    names = tuple(metadata.schema.names)
    if names != _COLUMNS:
        raise BadData(
            f"{path} has columns {list(names)}, {list(_COLUMNS)} are wanted: run `dvc repro -f download`"
        )
    # Of the parts of a long document only the first has the number 0.
    numbers = (metadata.row_group(n).column(3).statistics.min for n in range(metadata.num_row_groups))
    starts = [n for n, number in enumerate(numbers) if number == 0]
    for start, end in pairwise([*starts, metadata.num_row_groups]):
        yield RowGroup(path, start, end - start)


@contextmanager
def _named_damage(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise BadData(f"{what} is damaged ({error}): run `dvc repro -f download`") from error


def _read(group: RowGroup, part: int, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet as pq

    index = group.index + part
    with (
        _named_damage(f"{group.path}, row group {index},"),
        pq.ParquetFile(group.path, page_checksum_verification=True) as file,
    ):
        table = file.read_row_group(index, columns=list(columns), use_threads=False)
        table.validate(full=True)  # UTF-8, among others
    return table


def _texts(table: Any) -> Iterator[memoryview]:
    """The cells of the column `text`, without a Python string or a copy."""
    for chunk in table.column("text").chunks:
        _, offsets, content = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        view = memoryview(content if content is not None else b"")
        for start, end in pairwise(ends):
            yield view[start:end]


def stream_row_group(group: RowGroup) -> Iterator[Stored]:
    """Yield the documents of one piece, in memory bounded whatever their length.

    Raises:
        BadData: the shard is damaged.
    """
    first = _read(group, 0, ("id", "text", "source"))
    ids, sources = (first.column(name).to_pylist() for name in ("id", "source"))
    if group.parts == 1:
        for document_id, source, text in zip(ids, sources, _texts(first), strict=True):
            yield Stored(document_id, source, (text,))
        return
    yield Stored(ids[0], sources[0], _long(group))


def _long(group: RowGroup) -> Iterator[memoryview]:
    for part in range(group.parts):
        yield from _texts(_read(group, part, ("text",)))


def read_row_group(group: RowGroup) -> list[Document]:
    """Read the documents of one piece whole: for those that are known to be small."""
    return [
        Document(each.id, str(b"".join(each.parts), "utf-8"), each.source) for each in stream_row_group(group)
    ]


def read_names(group: RowGroup) -> list[tuple[str, str]]:
    """Read id and source of the documents of one piece, without their texts."""
    table = _read(group, 0, ("id", "source"))
    return list(zip(*(table.column(name).to_pylist() for name in ("id", "source")), strict=True))


def read_ids(path: Path) -> list[str]:
    """Read the ids of the documents of one shard, in order, without their texts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["id", "part"])
    return list(table.filter(pc.equal(table.column("part"), 0)).column("id").to_pylist())


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
