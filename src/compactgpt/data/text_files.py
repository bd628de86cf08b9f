"""Read the user's own text files as a corpus.

The module `splitting` cuts .txt and .md files into documents. In other files, each row is a document.
"""

import csv
import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, DiskFull, MissingInput, printable
from compactgpt.config import FILE_KINDS, Download, Files
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text, check_size, text_of_row
from compactgpt.data.hub import one_line
from compactgpt.data.inputs import check_files
from compactgpt.data.splitting import Line, Piece, read_lines, split_text

# Returns whether DVC ignores a file. It takes a path as returned by `list_files`.
IsIgnored = Callable[[str], bool]
_KEY = "download.files"
_KINDS = f"{' '.join(FILE_KINDS)} (also with .gz or .zst)"
FOLDER = "corpus"  # the folder of the user's text
_OWN_PAGE = "corpus/README.md"  # the project's page about the folder, which is not read
_BOM = b"\xef\xbb\xbf"
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_WINDOW_TOO_LARGE = "requires too much memory"  # part of libzstd's error message
_ROWS = 16  # number of parquet rows that are read at a time; small, since a row may be long
_CHUNK_BYTES = 2**20
# `max_decompression_ratio` is checked only if the decompressed content is larger than this.
_MIN_BYTES_TO_CHECK_RATIO = 2**24


def file_corpus(
    params: Download, root: Path, progress: Progress, log: Callable[[str], None], is_ignored: IsIgnored
) -> Corpus:
    """Return a corpus of the files that match `download.files.patterns`, in the project folder `root`.

    Logs which files in corpus/ are not read. Raises MissingInput if no file matches.
    """
    names = list_files(params.files.patterns, root, is_ignored)
    stats = [(root / name).stat() for _, name in names]
    _log_unread_files(params.files.patterns, root, {name for _, name in names}, log, is_ignored)

    def read(position: Any) -> Iterator[Text]:
        first, done = position or (0, 0)  # index of the first file to read, number of texts to skip in it
        for number, (part, name) in enumerate(names[first:], first):
            for index, (text, source, cut) in enumerate(read_file(root, name, params), 1):
                if number > first or index > done:
                    yield Text(text, source, part, [number, index], cut)
            progress(number + 1, len(names))

    rules = params.model_dump(mode="json", include={"files", "max_document_megabytes", "max_row_megabytes"})
    # The size and time of each file: if a file has changed, the corpus is read again from its start.
    identity = [rules, names, [[each.st_size, each.st_mtime_ns] for each in stats]]
    return Corpus("files", identity, [Part(pattern) for pattern in params.files.patterns], read)


# --- finding files


def list_files(patterns: Sequence[str], root: Path, is_ignored: IsIgnored) -> list[tuple[int, str]]:
    """Return (index of the matching pattern, path relative to `root`) of each text file, sorted.

    Files that DVC ignores are left out: DVC would not notice when they change.
    Raises MissingInput if no file matches, or if the file of a pattern without wildcards is missing.
    """
    for folder in {pattern.partition("/")[0] for pattern in patterns}:
        check_files(root / folder)
    found: dict[str, int] = {}
    ignored: set[str] = set()
    for index, pattern in enumerate(patterns):
        names = sorted(name for name in _matching_files(pattern, root) if file_kind(name) in FILE_KINDS)
        if not names and not has_magic(pattern):
            raise MissingInput(f"{pattern}, named in download.files.patterns, is missing")
        for name in names:
            if is_ignored(name):
                ignored.add(name)
            else:
                found.setdefault(name, index)
    if ignored and not found:
        raise MissingInput(_describe_ignored(sorted(ignored)))
    if not found:
        raise MissingInput(
            f"no file matches download.files.patterns ({', '.join(patterns)}) and has one of the suffixes "
            f"{_KINDS}: add files with text, or correct the patterns in params.yaml"
        )
    return [(index, name) for name, index in found.items()]


def _matching_files(pattern: str, root: Path) -> Iterator[str]:
    for name in glob(pattern, root_dir=root, recursive=True):  # noqa: PTH207 (Path.glob yields hidden files)
        if name != _OWN_PAGE and (root / name).is_file():
            yield name


def file_kind(name: str) -> str:
    """Return a file's suffix in lower case, without .gz or .zst: `.txt` for `a.TXT.gz`."""
    return Path(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def _log_unread_files(
    patterns: Sequence[str], root: Path, read: set[str], log: Callable[[str], None], is_ignored: IsIgnored
) -> None:
    # `**` finds no hidden folder, but the patterns may name one.
    found = {name for pattern in (f"{FOLDER}/**", *patterns) for name in _matching_files(pattern, root)}
    # `dvc add` writes a .dvc file next to each file.
    unread = sorted(name for name in found - read if not name.endswith(".dvc"))
    ignored = [name for name in unread if is_ignored(name)]
    if names := sorted({*unread} - {*ignored}):
        log(
            f"{_count_unread(names)}. To be read, a file must match download.files.patterns, and its name "
            f"must end with one of {_KINDS}"
        )
    if ignored:
        log(_describe_ignored(ignored))


def _count_unread(names: Sequence[str]) -> str:
    shown = printable(", ".join(names[:3])) + (", ..." if names[3:] else "")
    return f"not read: {len(names):,} of the files in {FOLDER}/ ({shown})"


def _describe_ignored(names: Sequence[str]) -> str:
    return (
        f"{_count_unread(names)}. DVC ignores them, because they match a pattern of .dvcignore, and would "
        "not notice changes in them. To have a file read, rename or move it, or change the pattern: "
        "`dvc check-ignore -d FILE` shows the pattern"
    )


# --- reading files


def read_file(root: Path, name: str, params: Download) -> Iterator[tuple[str, str, str]]:
    """Yield (text, source, cut) of each document of the file `name` in `root`.

    `cut` says where the file was cut, such as "blank lines".
    Raises BadData if the file is damaged, not UTF-8 or over a limit.
    """
    import pyarrow as pa

    path, shown = root / name, printable(name)
    if not path.stat().st_size:
        raise BadData(f"{shown} is empty: remove it from the corpus")
    read = _READERS.get(file_kind(name), _read_text)
    try:
        with _open(path, shown, params) as file:
            for line, text, cut in read(file, shown, params):
                yield text, f"{name}:{line}" if line else name, cut
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error with `errno` comes from the disk: the file may be undamaged
        if _WINDOW_TOO_LARGE in str(error):
            old, new = (printable(shlex.quote(f"{path}{end}")) for end in ("", ".new"))
            raise BadData(
                f"{shown} was compressed with a window over 128 MB (such as `zstd --long=28`): reading it "
                "needs too much memory. Compress it again: "
                f"`zstd -dc --long=31 {old} | zstd -o {new} && mv {new} {old}`"
            ) from error
        problem = "is damaged, or was cut short, or is not of the kind that its name says"
        raise BadData(f"{shown} {problem} ({one_line(error)}): replace or remove the file") from error


def _open(path: Path, name: str, params: Download) -> io.BufferedReader:
    if path.suffix.lower() not in _CODECS:
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, name, params.files), _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    """Reads a compressed file. Raises BadData if the decompressed content is over a limit of `params`."""

    def __init__(self, path: Path, name: str, params: Files) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(str(path), compression=_CODECS[path.suffix.lower()])
        self._name, self._read = name, 0
        by_ratio = max(_MIN_BYTES_TO_CHECK_RATIO, params.max_decompression_ratio * path.stat().st_size)
        self._max_bytes = min(by_ratio, params.max_decompressed_megabytes * MEGABYTE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._stream.readinto(buffer)
        self._read += size
        if self._read > self._max_bytes:
            raise BadData(
                f"{self._name} holds more than {self._max_bytes // MEGABYTE:,} MB decompressed "
                "(max_decompressed_megabytes, max_decompression_ratio in download.files): remove the file, "
                "or raise the limits"
            )
        return size


def _read_text(file: IO[bytes], name: str, params: Download) -> Iterator[Piece]:
    megabytes = params.max_document_megabytes
    for piece in split_text(file, name, params.files, megabytes * MEGABYTE):
        where = f"{name}, from line {piece.line:,}," if piece.line else name
        check_size(len(piece.text), where, "max_document_megabytes", megabytes)
        yield piece


def _rows(file: IO[bytes], name: str, params: Download) -> Iterator[Line]:
    max_bytes = params.max_row_megabytes * MEGABYTE + 1
    for line in read_lines(file, name, max_bytes):
        size = len(line.text) if line.is_end else max_bytes
        check_size(size, f"{name}, line {line.number:,}", "max_row_megabytes", params.max_row_megabytes)
        yield line


def _read_json(file: io.BufferedReader, name: str, params: Download) -> Iterator[Piece]:
    """Yield the rows of a JSON array, or of a file with one JSON value per line."""
    column, megabytes = params.files.text_column, params.max_document_megabytes
    if file.peek(_CHUNK_BYTES).removeprefix(_BOM).lstrip().startswith(b"["):
        content = file.read(megabytes * MEGABYTE + 1)
        check_size(len(content), f"{name}, a JSON array,", "max_document_megabytes", megabytes)
        for number, row in enumerate(_parse_json(content, name), 1):
            yield Piece(number, text_of_row(row, f"{name}, row {number:,}", column, _KEY))
        return
    for line in _rows(file, name, params):
        if line.text.strip():
            where = f"{name}, line {line.number:,}"
            yield Piece(line.number, text_of_row(_parse_json(line.text, where), where, column, _KEY))


def _parse_json(content: str | bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # deeply nested brackets cause a RecursionError
        raise BadData(
            f"{where} is not valid JSON ({error}): write one JSON array, or one JSON value per line"
        ) from error


def _read_csv(file: IO[bytes], name: str, params: Download) -> Iterator[Piece]:
    csv.field_size_limit(params.max_row_megabytes * MEGABYTE)
    column = params.files.text_column
    lines = (line.text for line in _rows(file, name, params))
    first = next(lines, "")
    headers = {each: next(csv.reader(first.splitlines(), delimiter=each), []) for each in ",;\t"}
    delimiter = next((each for each in headers if column in headers[each]), ",")
    _check_column(headers[delimiter], name, column)
    rows = csv.DictReader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            # DictReader stores surplus values under the key None, and sets missing values to None.
            if None in row or None in row.values():
                raise csv.Error("the row and the header have different numbers of values")
            yield Piece(rows.line_num, row[column])
    except csv.Error as error:
        raise BadData(
            f"{name}, line {rows.reader.line_num:,} is not valid CSV ({error}): correct the line, or put "
            "quotes around a value that contains the delimiter"
        ) from error


def _read_parquet(file: IO[bytes], name: str, params: Download) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    column, megabytes = params.files.text_column, params.max_row_megabytes
    with TemporaryFile() as temporary:
        if not file.seekable():  # decompress the file first, since parquet is read from its end
            _copy(file, temporary, name, params.files.min_free_disk_megabytes)
            file = temporary
        # To detect damage, pyarrow compares the checksums of pages, if the file has checksums.
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            _check_column(table.schema_arrow.names, name, column)
            batches = table.iter_batches(_ROWS, columns=[column])
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                where = f"{name}, row {number:,}"
                text = text_of_row(value, where, column, _KEY)
                check_size(len(text), where, "max_row_megabytes", megabytes)
                yield Piece(number, text)


def _copy(file: IO[bytes], target: IO[bytes], name: str, free_megabytes: int) -> None:
    while chunk := file.read(_CHUNK_BYTES):
        if shutil.disk_usage(target.fileno()).free - len(chunk) < free_megabytes * MEGABYTE:
            raise DiskFull(
                f"no space on the disk to decompress {name}: {free_megabytes:,} MB must stay free "
                "(download.files.min_free_disk_megabytes). Free some space, or set TMPDIR to another disk"
            )
        target.write(chunk)


def _check_column(columns: Sequence[str], name: str, column: str) -> None:
    if columns.count(column) != 1:
        raise BadData(
            f"{name} has columns {columns[:8]}, expected one column {column!r}: "
            "set download.files.text_column in params.yaml, or rename the column"
        )


_READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
