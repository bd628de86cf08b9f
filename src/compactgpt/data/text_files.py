"""The user's own text files as a corpus.

A .txt or .md file is one document, or is cut into documents (module `splitting`). In a file of another kind,
each row is one document. Files may be compressed (.gz or .zst). A byte-order mark at the start of a file is
removed. Error messages contain the file and the line. Memory holds the names of all files, and one document;
of a .json file with an array it holds the complete content.
"""

import csv
import io
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, DiskFull, MissingInput, printable
from compactgpt.config import FILE_KINDS, Download
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text
from compactgpt.data.hub import one_line
from compactgpt.data.inputs import refuse_linked_folders, regular_status, require_utf8
from compactgpt.data.splitting import Piece, not_utf8, split_text

FOLDER = "corpus"  # files in this folder that are not read are reported
_OWN_PAGE = "corpus/README.md"  # the project's page about this folder; wildcards do not match it
_BOM = b"\xef\xbb\xbf"
_ROWS = 16  # rows of a parquet file read at a time; few, since a row may be long
_CHUNK_BYTES = 2**20
_ANY_RATIO_BYTES = 2**24  # decompressed size allowed at any ratio, since a small file is harmless


def file_corpus(params: Download, root: Path, progress: Progress, log: Callable[[str], None]) -> Corpus:
    """Return the files that match `download.files.patterns` in the folder `root` as a corpus.

    Messages to `log` say which files were cut into documents, and which files in corpus/ are not read.

    Raises:
        MissingInput: a file is missing, or no file matches.
        BadData: a file name is not UTF-8, or a path is not a regular file.
    """
    names = list_files(params.files.patterns, root)
    stats = [regular_status(root / name, printable(name)) for _, name in names]
    for message in unread_files(root, {name for _, name in names}):
        log(message)

    def read(position: Any) -> Iterator[Text]:
        first, done = position or (0, 0)  # index of the first file, and how many of its texts to skip
        # For each way of cutting, the number of documents in each file.
        cuts: dict[str, Counter[str]] = defaultdict(Counter)
        try:
            for number in range(first, len(names)):
                part, name = names[number]
                for index, (text, source, way) in enumerate(read_file(root, name, params), 1):
                    if way:
                        cuts[way][name] += 1
                    if number > first or index > done:  # skip the texts of the first file that were read
                        yield Text(text, source, part, [number, index])
                progress(number + 1, len(names))
        finally:  # also if the caller stops reading because of `download.max_documents`
            for way, numbers in cuts.items():
                files = f"{len(numbers):,} files" if len(numbers) > 1 else f"{next(iter(numbers))}: 1 file"
                log(
                    f"{printable(files)} -> {numbers.total():,} documents by {way} "
                    f"(download.files.split: {params.files.split})"
                )

    rules = params.model_dump(mode="json", include={"files", "max_document_megabytes", "max_row_megabytes"})
    # A changed file changes the identity, and the corpus is read again from its start.
    identity = [rules, names, [[each.st_size, each.st_mtime_ns] for each in stats]]
    return Corpus("files", identity, [Part(pattern) for pattern in params.files.patterns], read)


# --- finding files


def list_files(patterns: Sequence[str], root: Path) -> list[tuple[int, str]]:
    """Return (index of the pattern, path relative to `root`) of each file, sorted by pattern and path.

    The pattern `folder/**` stands for every file below the folder of the kinds that are read.

    Raises:
        MissingInput: no file matches, or a pattern without wildcards is the path of a missing file.
        BadData: a file name is not UTF-8.
    """
    found: dict[str, int] = {}  # in the order in which the files are read
    for index, pattern in enumerate(patterns):
        paths = _matching_files(root, f"{pattern}/*" if pattern.endswith("/**") else pattern)
        names = sorted(name for name in paths if file_kind(name) in FILE_KINDS)
        if not names and not has_magic(pattern):
            raise MissingInput(f"{pattern}, named in download.files.patterns, is missing")
        for name in names:
            found.setdefault(name, index)
    if not found:
        unread = "".join(f"; {message}" for message in unread_files(root, set()))
        raise MissingInput(
            f"no file matches download.files.patterns ({', '.join(patterns)}): "
            f"put text there, or correct the patterns in params.yaml{unread}"
        )
    return [(index, name) for name, index in found.items()]


def file_kind(name: str) -> str:
    """Return the suffix of a file in lower case, without .gz or .zst."""
    return Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def unread_files(
    root: Path, read: set[str], reason: str = "no pattern of download.files.patterns matches"
) -> list[str]:
    """Return messages about the files in the folder corpus/ that are not in `read`.

    `reason` is the reason in the message for files of the kinds that are read.
    """
    unknown = f"the kinds that are read are {' '.join(FILE_KINDS)}, also with .gz or .zst"
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(_matching_files(root, f"{FOLDER}/**/*")) - read):
        if Path(name).suffix != ".dvc":  # DVC writes a .dvc file for each added file
            reasons[reason if file_kind(name) in FILE_KINDS else unknown].append(name)
    return [
        f"not read: {len(names):,} of the files in {FOLDER}/ ({printable(', '.join(names[:3]))}"
        f"{', ...' if names[3:] else ''}): {why}"
        for why, names in reasons.items()
    ]


def _matching_files(root: Path, pattern: str) -> Iterator[str]:
    """Yield the paths relative to `root` that match a pattern, as `glob.glob` returns them.

    Raises BadData if a folder is a link. corpus/README.md is not yielded for a pattern with wildcards.
    """
    parts = pattern.split("/")
    fixed = 0  # number of parts before the first wildcard
    while fixed < len(parts) and not has_magic(parts[fixed]):
        fixed += 1
    if fixed == len(parts):
        if os.path.lexists(root / pattern):
            yield pattern
        return
    start = root.joinpath(*parts[:fixed])
    for parent, folders, names in os.walk(start, onerror=_raise_if_forbidden):
        # As in a shell, wildcards do not match names that start with a dot.
        folders[:] = [name for name in folders if name[0] != "."]
        refuse_linked_folders(Path(parent), folders)
        above = Path(parent).relative_to(start).parts
        if "**" not in parts and len(above) == len(parts) - fixed - 1:
            folders.clear()  # no deeper path can match
        for name in names:
            path = Path(parent, name)
            if name[0] != "." and _matches([*above, name], parts[fixed:]):
                require_utf8(path)
                found = path.relative_to(root).as_posix()
                if found != _OWN_PAGE:
                    yield found


def _raise_if_forbidden(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise error


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not names or not parts:
        return not names and not parts
    if parts[0] == "**":  # any number of folders
        return any(_matches(names[skipped:], parts[1:]) for skipped in range(len(names)))
    return fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


# --- reading files


def read_file(root: Path, name: str, params: Download) -> Iterator[tuple[str, str, str]]:
    """Yield (text, source, way) of each document of the file `name`, which is relative to `root`.

    The way is the value of `splitting.Piece.way`; it is empty if the file was not cut.

    Raises:
        MissingInput: the file is missing.
        BadData: the file is empty, damaged or not UTF-8, lacks the text column, or exceeds a limit.
        DiskFull: there is not enough space to decompress a parquet file.
    """
    path, shown = root / name, printable(name)
    if not regular_status(path, shown).st_size:
        raise BadData(f"{shown} is empty: remove it from the corpus")
    read = _READERS.get(file_kind(name))
    with _open(path, shown, params) as file:
        if read is None:
            for line, text, way in _read_text(file, shown, params):
                yield text, f"{name}:{line}" if line else name, way
        else:
            for row, text in read(file, shown, params):
                yield text, f"{name}:{row}", ""


def _open(path: Path, name: str, params: Download) -> io.BufferedReader:
    if path.suffix.lower() not in (".gz", ".zst"):
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, name, params), _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file.

    Reading raises BadData if the file is damaged or its content is larger than allowed.
    """

    def __init__(self, path: Path, name: str, params: Download) -> None:
        import pyarrow as pa

        codec = "gzip" if path.suffix.lower() == ".gz" else "zstd"
        self._stream = pa.input_stream(str(path), compression=codec)
        self._name, self._read = name, 0
        by_ratio = max(_ANY_RATIO_BYTES, params.files.max_decompression_ratio * path.stat().st_size)
        self._limit = min(by_ratio, params.files.max_decompressed_megabytes * MEGABYTE)
        self._key = "max_decompression_ratio" if self._limit == by_ratio else "max_decompressed_megabytes"

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            if "too much memory" in str(error):  # a zstd window over 128 MB
                raise BadData(
                    f"{self._name} was made with zstd --long=28 or more, a window over 128 MB: "
                    "compress it again with --long=27 or less"
                ) from error
            raise BadData(f"{self._name} is damaged, or was cut short ({one_line(error)})") from error
        self._read += len(content)
        if self._read > self._limit:
            raise BadData(
                f"{self._name} holds more than {self._limit // MEGABYTE:,} MB decompressed "
                f"(download.files.{self._key}): remove the file, or raise the limit"
            )
        buffer[: len(content)] = content
        return len(content)


def _decode(content: bytes, name: str, line: int = 1) -> str:
    try:
        return content.removeprefix(_BOM if line == 1 else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, name, line) from error


def _check_size(size: int, what: str, key: str, params: Download) -> None:
    megabytes = getattr(params, key)
    if size > megabytes * MEGABYTE:
        raise BadData(
            f"{what} is longer than {megabytes:,} MB (download.{key}): cut it into documents "
            "(download.files.split, for .txt and .md), remove it, or raise the limit"
        )


def _read_text(file: IO[bytes], name: str, params: Download) -> Iterator[Piece]:
    limit = params.max_document_megabytes
    is_blank = True
    for piece in split_text(file, name, params.files, limit * MEGABYTE):
        where = f"{name}, from line {piece.line:,}," if piece.line else name
        _check_size(len(piece.text), where, "max_document_megabytes", params)
        is_blank = is_blank and not piece.text.strip()
        yield piece
    if is_blank:
        raise BadData(f"{name} holds only white space: remove it from the corpus")


# Each of these readers yields (number of the row or line, from 1; text).


def _lines(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    for line in count(1):
        content = file.readline(params.max_row_megabytes * MEGABYTE + 1)
        if not content and line == 1:  # a compressed file may have no content
            raise BadData(f"{name} is empty: remove it from the corpus")
        if not content:
            return
        _check_size(len(content), f"{name}, line {line:,}", "max_row_megabytes", params)
        yield line, _decode(content, name, line)


def _read_jsonl(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    for line, content in _lines(file, name, params):
        if content.strip():
            where = f"{name}, line {line:,}"
            yield line, _text_of_row(_parse_json(content, where), where, params.files.text_column)


def _read_json(file: io.BufferedReader, name: str, params: Download) -> Iterator[tuple[int, str]]:
    if not file.peek(_CHUNK_BYTES).removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _read_jsonl(file, name, params)  # many .json files have one object per line
        return
    limit = params.max_document_megabytes * MEGABYTE
    content = file.read(limit + 1)
    if len(content) > limit:
        raise BadData(
            f"{name} is a JSON array, read at once, and longer than {params.max_document_megabytes:,} MB: "
            "write one object per line (jq -c '.[]' a.json > a.jsonl), or raise "
            "download.max_document_megabytes"
        )
    for number, row in enumerate(_parse_json(_decode(content, name), name), 1):
        yield number, _text_of_row(row, f"{name}, row {number:,}", params.files.text_column)


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
        raise BadData(
            f"{where} is not valid JSON ({error}): correct it; a row of .jsonl or .json is one line, and a "
            "file of one JSON array has the name .json"
        ) from error


def _text_of_row(row: Any, where: str, column: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or column not in row:
        found = f"keys {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
        raise BadData(
            f"{where}: found {found}, expected a JSON object with the text column {column!r}: "
            "set download.files.text_column in params.yaml, or correct the row"
        )
    text = row[column]
    if not isinstance(text, str):
        raise BadData(
            f"{where}: {column!r} is {type(text).__name__}, expected text: correct or remove the row"
        )
    return text


def _read_csv(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(params.max_row_megabytes * MEGABYTE)
    column = params.files.text_column
    lines = (text for _, text in _lines(file, name, params))
    first = next(lines)
    names = {each: next(csv.reader(first.splitlines(), delimiter=each), []) for each in ",;\t"}
    delimiter = next((each for each in names if column in names[each]), ",")
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = next(rows)
        _check_column(header, name, column)
        for row in rows:
            if row and len(row) != len(header):
                raise BadData(
                    f"{name}, line {rows.line_num:,}: found {len(row)} values, the header has {len(header)}: "
                    "correct the line, or put quotes around a value that contains the delimiter"
                )
            if row:
                yield rows.line_num, row[header.index(column)]
    except csv.Error as error:
        where = f"{name}, line {rows.line_num:,}"
        raise BadData(f"{where} is not valid CSV ({error}): correct the line") from error


def _read_parquet(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, column = 0, params.files.text_column
    try:
        with (
            TemporaryFile() as temporary,
            _seekable(file, temporary, name, params) as source,
            # Raise an error if a page's checksum differs. Files without checksums are accepted.
            pq.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            _check_column(table.schema_arrow.names, name, column)
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise BadData(f"{name}: column {column!r} is {kind}, expected text")
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise BadData(f"{name}, row {row:,}: {column!r} is null: correct or remove the row")
                    _check_size(len(text), f"{name}, row {row:,}", "max_row_megabytes", params)
                    yield row, text
    except UnicodeDecodeError as error:  # Arrow decodes a complete batch, so the exact row is unknown
        raise BadData(f"{name}: a text in rows {row + 1:,} to {row + _ROWS:,} is not UTF-8") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{name} is not a valid parquet file, or was cut short ({one_line(error)})") from error


def _seekable(file: IO[bytes], temporary: IO[bytes], name: str, params: Download) -> IO[bytes]:
    """Return a seekable file, since parquet is read from its end.

    The decompressed content of a compressed file is copied to `temporary`.
    """
    if file.seekable():
        return file
    free_megabytes = params.files.min_free_disk_megabytes
    while chunk := file.read(_CHUNK_BYTES):
        if shutil.disk_usage(temporary.fileno()).free - len(chunk) < free_megabytes * MEGABYTE:
            raise DiskFull(
                f"{name} needs more space to be decompressed than the folder of temporary files has, where "
                f"{free_megabytes:,} MB must stay free (download.files.min_free_disk_megabytes): "
                "free some space, or set TMPDIR to another disk"
            )
        temporary.write(chunk)
    return temporary


def _check_column(columns: Sequence[str], name: str, column: str) -> None:
    number = columns.count(column)
    if number != 1:
        found = f"{number} columns are called" if number else "none is"
        raise BadData(
            f"{name} has columns {columns[:8]}, {found} {column!r}: "
            "set download.files.text_column in params.yaml, or rename the column"
        )


# Files of other kinds are text: `_read_text`.
_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
