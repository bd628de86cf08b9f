"""The user's own text: .txt and .md (one document a file), .jsonl and .parquet (one document a row).

Each of them may be compressed, .gz or .zst. Text is taken as it is, but for a byte-order mark at the start
of a file. Every mistake is named with its file and line. Files are listed folder by folder and read one by
one, row by row, so that memory holds one document and the names in one folder. A document has a limit in
params.yaml, since it is read whole, in several times its size of memory.
"""

import glob
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, DiskFull, MissingInput, printable
from compactgpt.config import Files
from compactgpt.data.inputs import regular_status, require_utf8
from compactgpt.data.sources import MEGABYTE, Origin, Piece

_BOM = b"\xef\xbb\xbf"
_ROWS = 16  # of a parquet file, read at a time
_CHUNK_BYTES = 2**20
_ANY_RATIO_BYTES = 2**24  # that a compressed file may hold at any ratio: a small file of blanks does no harm
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Rules:
    """How files are read."""

    text_column: str  # of .jsonl and .parquet
    max_document_bytes: int  # of .txt and .md
    max_row_bytes: int  # of .jsonl and .parquet
    max_decompressed_bytes: int  # of one file
    max_decompression_ratio: int  # decompressed bytes for one of the file's
    free_disk_bytes: int  # that stay free when a file is unpacked on disk


class FileReader:
    """The files that the patterns match, as a corpus: see compactgpt.corpus.Reader."""

    name = "files"
    lengths = range(1, 2**62)

    def __init__(
        self,
        files: Files,
        root: Path,
        max_document_bytes: int,
        max_row_bytes: int,
        progress: Progress = silent,
    ) -> None:
        self._files, self._root, self._progress = files, root, progress
        self._rules = Rules(
            files.text_column,
            max_document_bytes,
            max_row_bytes,
            files.max_decompressed_megabytes * MEGABYTE,
            files.max_decompression_ratio,
            files.min_free_disk_megabytes * MEGABYTE,
        )
        self.parts = [Origin(pattern) for pattern in files.patterns]
        self._place = (0, 0)

    @cached_property
    def _listing(self) -> tuple[int, str]:
        """How many files there are, and a hash of their names, sizes and times."""
        hasher, number = hashlib.sha256(), 0
        for part, name in list_files(self._files, self._root):
            status = regular_status(self._root / name, printable(name))
            hasher.update(f"{part}\0{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            number += 1
        return number, hasher.hexdigest()

    @property
    def identity(self) -> Any:
        """The rules, and the files by name, size and time."""
        return [vars(self._rules), *self._listing]

    def read(self, place: Any) -> Iterator[Piece]:
        """Yield the texts behind a place: a file's number, and how many of its rows are done."""
        first, done = place or (0, 0)
        total, _ = self._listing
        for number, (part, name) in enumerate(list_files(self._files, self._root)):
            if number < first:
                continue
            rows = read_texts(self._root, name, self._rules, done if number == first else 0)
            for text, where, row in rows:
                self._place = (number, row)
                yield Piece(text, where, part)
            self._progress(number + 1, total)

    def place(self) -> Any:
        """The number of the file, and of its rows that are done."""
        return list(self._place)


# --- which files there are


def list_files(files: Files, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (index of the pattern, path relative to `root`): by pattern, then by name, each file once.

    Memory holds the names in one folder, and in those above it.

    Raises:
        MissingInput: nothing matches, or a pattern without wildcards names a file that is not there.
        BadData: a folder can't be read, or a name is no Unicode text.
    """
    shapes = [re.compile(_pattern_regex(pattern)) for pattern in files.patterns]
    any_file = False
    for index, pattern in enumerate(files.patterns):
        found = False
        for name in _matching(root, pattern, shapes[index]):
            found = any_file = True
            if not any(shape.fullmatch(name) for shape in shapes[:index]):
                yield index, name
        if not found and not glob.has_magic(pattern):
            raise MissingInput(f"{pattern}, named in download.files.patterns, is missing")
    if not any_file:
        raise MissingInput(
            f"no file matches download.files.patterns ({', '.join(files.patterns)}): "
            "put text there, or mend the patterns in params.yaml"
        )


def _pattern_regex(pattern: str) -> str:
    """Translate a glob as glob.glob reads it: hidden names match no wildcard, `**` crosses folders."""
    parts = pattern.split("/")
    folders = ["(?:[^/.][^/]*/)*" if part == "**" else _part_regex(part) + "/" for part in parts[:-1]]
    return "".join(folders) + _part_regex(parts[-1])


def _part_regex(part: str) -> str:
    words = re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[", part)
    simple = {"?": "[^/]"}
    regex = ""
    for word in words:
        if word.startswith("*"):
            regex += "[^/]*"
        elif len(word) > 1 and word.startswith("["):
            inside = word[1:-1].replace("\\", r"\\").replace("[", r"\[")
            regex += "[" + ("^" + inside[1:] if inside.startswith("!") else inside) + "]"
        else:
            regex += simple.get(word, re.escape(word))
    return regex if words and not glob.has_magic(words[0]) else r"(?!\.)" + regex


def _matching(root: Path, pattern: str, shape: re.Pattern[str]) -> Iterator[str]:
    parts = pattern.split("/")
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if fixed == len(parts):
        if (root / pattern).is_symlink() or (root / pattern).exists():
            yield pattern
        return
    depth = None if "**" in parts else len(parts) - fixed
    start = "".join(part + "/" for part in parts[:fixed])
    for name in _walk(root, start, depth, ()):
        if shape.fullmatch(name):
            yield name


def _walk(root: Path, start: str, depth: int | None, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the files under a folder in the order of their paths; links are followed, loops are not."""
    folder = root / start
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for name in _sorted_names(folder):
            if not name.endswith("/"):
                yield start + name
            elif depth is None or depth > 1:
                yield from _walk(root, start + name, depth and depth - 1, (*above, here))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise BadData(f"{start or '.'} can't be read: its permissions forbid it") from error


def _sorted_names(folder: Path) -> list[str]:
    """The names in a folder, a slash behind those of folders, so that their order is that of whole paths."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                require_utf8(folder / entry.name)
                names.append(entry.name + "/" * _is_folder(entry))
    return sorted(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: refused as a file, if a pattern matches its name
        return False


# --- what is in them


Text = tuple[str, str, int]  # text, source, row
Row = tuple[str, int]  # text, its number in the file from 1


def read_texts(root: Path, name: str, rules: Rules, done: int = 0) -> Iterator[Text]:
    """Yield (text, source, row) for each document of one file, but for the first `done` rows.

    Raises:
        MissingInput: the file is not there.
        BadData: it is empty, damaged, not UTF-8, lacks the column, or is larger than the rules allow.
    """
    path, shown = root / name, printable(name)
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix
    read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_whole)
    size = regular_status(path, shown).st_size
    if not size:
        raise BadData(f"{shown} is empty: remove it from the corpus")
    try:
        with _opened(path, shown, rules, size) as file:
            for text, row in read(file, shown, rules, done):
                yield text, name if read is _read_whole else f"{name}:{row}", row
    except PermissionError as error:
        raise BadData(f"{shown} can't be read: its permissions forbid it") from error


@contextmanager
def _opened(path: Path, name: str, rules: Rules, size: int) -> Iterator[IO[bytes]]:
    """Open a file of `size` bytes for reading, decompressed."""
    if path.suffix not in _COMPRESSIONS:
        with open(path, "rb") as plain:
            yield plain
        return
    import pyarrow as pa

    with pa.input_stream(str(path), compression=_COMPRESSIONS[path.suffix]) as packed:
        raw = _Decompressed(packed, name, rules, size)
        yield io.BufferedReader(raw, _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    """A decompressed stream that is refused in a sentence where it is damaged or grows out of proportion."""

    def __init__(self, stream: Any, name: str, rules: Rules, size: int) -> None:
        self._stream, self._name, self._read = stream, name, 0
        by_ratio = max(_ANY_RATIO_BYTES, rules.max_decompression_ratio * size)
        self._limit = min(by_ratio, rules.max_decompressed_bytes)
        self._key = "max_decompression_ratio" if self._limit == by_ratio else "max_decompressed_megabytes"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            raise BadData(f"{self._name} is damaged, or was cut short ({_words(error)})") from error
        self._read += len(content)
        if self._read > self._limit:
            raise BadData(
                f"{self._name} holds more than {self._limit // MEGABYTE:,} MB decompressed "
                f"(download.files.{self._key}): remove the file, or raise the limit if the file is meant"
            )
        buffer[: len(content)] = content
        return len(content)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_whole(file: IO[bytes], name: str, rules: Rules, done: int) -> Iterator[Row]:
    if done:
        return
    content = file.read(rules.max_document_bytes + 1)
    if len(content) > rules.max_document_bytes:
        raise BadData(
            f"{name} is longer than {rules.max_document_bytes // MEGABYTE:,} MB "
            "(download.max_document_megabytes): cut it into documents, remove it, or raise the limit"
        )
    content = content.removeprefix(_BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(_not_utf8(name, line, error)) from error
    if not text.strip():
        raise BadData(f"{name} holds only white space: remove it from the corpus")
    yield text, 1


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{name}, line {line:,}: byte 0x{byte:02x} is not UTF-8: convert the file (iconv) or remove it"


def _long_row(where: str, limit: int) -> BadData:
    return BadData(
        f"{where} is longer than {limit // MEGABYTE:,} MB (download.max_row_megabytes): cut it into "
        "documents, remove it, or raise the limit"
    )


def _read_jsonl(file: IO[bytes], name: str, rules: Rules, done: int) -> Iterator[Row]:
    line = 0
    while raw := file.readline(rules.max_row_bytes + 1):
        line += 1
        if len(raw) > rules.max_row_bytes:
            raise _long_row(f"{name}, line {line:,}", rules.max_row_bytes)
        content = raw.removeprefix(_BOM) if line == 1 else raw
        if line > done and content.strip():
            yield _json_text(content, name, line, rules.text_column), line
    if not line:
        raise BadData(f"{name} is empty: remove it from the corpus")


def _json_text(content: bytes, name: str, line: int, column: str) -> str:
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadData(_not_utf8(name, line, error)) from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{name}, line {line:,}: no JSON ({error}): mend or remove the line") from error
    if not isinstance(row, dict) or column not in row:
        found = f"keys {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
        raise BadData(
            f"{name}, line {line:,}: found {found} where a JSON object with the text column {column!r} "
            "is wanted: set download.files.text_column in params.yaml, or mend the line"
        )
    text = row[column]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadData(f"{name}, line {line:,}: {column!r} is {kind}, text is wanted: mend or remove the line")
    return text


def _read_parquet(file: IO[bytes], name: str, rules: Rules, done: int) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, column = 0, rules.text_column
    try:
        with (
            _seekable(file, name, rules) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            _check_column(table.schema_arrow, name, column)
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise BadData(f"{name}, row {row:,}: {column!r} is null: mend or remove the row")
                    if len(text) > rules.max_row_bytes:
                        raise _long_row(f"{name}, row {row:,}", rules.max_row_bytes)
                    if row > done:
                        yield text, row
    except UnicodeDecodeError as error:
        raise BadData(f"{name}: a text in rows {row + 1:,} to {row + _ROWS:,} is not UTF-8") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{name} is no readable parquet file, or was cut short ({_words(error)})") from error


@contextmanager
def _seekable(file: IO[bytes], name: str, rules: Rules) -> Iterator[IO[bytes]]:
    """A parquet file is read from its end: a compressed one is unpacked on disk first."""
    if file.seekable():
        yield file
        return
    with TemporaryFile() as unpacked:
        while chunk := file.read(_CHUNK_BYTES):
            if shutil.disk_usage(unpacked.fileno()).free - len(chunk) < rules.free_disk_bytes:
                raise DiskFull(
                    f"{name} needs more room to be unpacked than the folder of temporary files has, where "
                    f"{rules.free_disk_bytes // MEGABYTE:,} MB must stay free "
                    "(download.files.min_free_disk_megabytes): free some space, or set TMPDIR to another disk"
                )
            unpacked.write(chunk)
        yield unpacked


def _check_column(schema: Any, name: str, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise BadData(
            f"{name} has columns {schema.names}, none is {column!r}: "
            "set download.files.text_column in params.yaml"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadData(f"{name}: column {column!r} is {kind}, text is wanted")
