"""The user's own text: .txt and .md (one document a file), .jsonl and .parquet (one document a row).

Any of them may be compressed, .gz or .zst. Text is taken as it is, except for a byte-order mark at the start
of a file. A mistake is reported with its file and line. Memory holds the names of all files and one document.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, DiskFull, MissingInput, printable
from compactgpt.config import Download
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text
from compactgpt.data.inputs import regular_status, require_utf8

_BOM = b"\xef\xbb\xbf"
_ROWS = 16  # of a parquet file, read at a time
_CHUNK_BYTES = 2**20
_ANY_RATIO_BYTES = 2**24  # that a compressed file may hold at any ratio: a small file of blanks does no harm


def file_corpus(params: Download, root: Path, progress: Progress) -> Corpus:
    """Return the files that `download.files.patterns` match, relative to `root`, as a corpus.

    Raises:
        MissingInput, BadData: see `list_files` and `regular_status`.
    """
    names = list_files(params.files.patterns, root)
    files = []
    for part, name in names:
        status = regular_status(root / name, printable(name))
        files.append([part, name, status.st_size, status.st_mtime_ns])

    def read(position: Any) -> Iterator[Text]:
        first, done = position or (0, 0)  # index of a file, and how many of its texts were read
        for number in range(first, len(names)):
            part, name = names[number]
            for count, (text, source) in enumerate(read_file(root, name, params), 1):
                if number > first or count > done:
                    yield Text(text, source, part, [number, count])
            progress(number + 1, len(names))

    rules = params.model_dump(mode="json", include={"files", "max_document_megabytes", "max_row_megabytes"})
    return Corpus("files", [rules, files], [Part(pattern) for pattern in params.files.patterns], read)


# --- which files there are


def list_files(patterns: Sequence[str], root: Path) -> list[tuple[int, str]]:
    """Return (index of the pattern, path relative to `root`) by pattern, then by path, each file once.

    Raises:
        MissingInput: nothing matches, or a pattern without wildcards names a file that is missing.
        BadData: a folder can't be read, or a name is not UTF-8.
    """
    # With dicts as sets that keep their order.
    found: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        names = sorted(_matching_files(root, pattern))
        if not names and not has_magic(pattern):
            raise MissingInput(f"{pattern}, named in download.files.patterns, is missing")
        for name in names:
            found.setdefault(name, index)
    if not found:
        raise MissingInput(
            f"no file matches download.files.patterns ({', '.join(patterns)}): "
            "put text there, or correct the patterns in params.yaml"
        )
    return [(index, name) for name, index in found.items()]


def _matching_files(root: Path, pattern: str) -> Iterator[str]:
    if not has_magic(pattern):
        if os.path.lexists(root / pattern):
            yield pattern
        return
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if has_magic(part))
    start = root.joinpath(*parts[:fixed])
    for parent, folders, names in os.walk(start, onerror=_refuse_folder, followlinks=True):
        # Names with a dot in front match no wildcard, as in a shell.
        folders[:] = [name for name in folders if name[0] != "." and not _is_loop(Path(parent, name))]
        above = Path(parent).relative_to(start).parts
        if "**" not in parts and len(above) >= len(parts) - fixed - 1:
            folders.clear()
        for name in names:
            path = Path(parent, name)
            if name[0] != "." and _matches([*above, name], parts[fixed:]):
                require_utf8(path)
                yield path.relative_to(root).as_posix()


def _refuse_folder(error: OSError) -> None:
    if isinstance(error, PermissionError):
        raise BadData(f"{error.filename} can't be read: its permissions forbid it") from error


def _is_loop(folder: Path) -> bool:
    """Return whether a folder is a link to a folder that contains it: following it would never end."""
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.absolute().parents)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Return whether a path matches a pattern as `glob.glob(recursive=True)` would; both are split at /."""
    if not names or not parts:
        return not names and not parts
    if parts[0] == "**":
        return any(_matches(names[skipped:], parts[1:]) for skipped in range(len(names)))
    return fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


# --- what is in them


def read_file(root: Path, name: str, params: Download) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of each document of one file.

    Args:
        root: the folder that `name` is relative to.
        name: path of the file.
        params: `files` and the limits of one document's size are used.

    Raises:
        MissingInput: the file is missing.
        BadData: it is empty, damaged, not UTF-8, lacks the column, or is larger than the limits.
        DiskFull: there is no room to decompress a parquet file.
    """
    path, shown = root / name, printable(name)
    if not regular_status(path, shown).st_size:
        raise BadData(f"{shown} is empty: remove it from the corpus")
    kind = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    try:
        with _open(path, shown, params) as file:
            if kind == ".jsonl":
                for line, text in _read_jsonl(file, shown, params):
                    yield text, f"{name}:{line}"
            elif kind == ".parquet":
                for row, text in _read_parquet(file, shown, params):
                    yield text, f"{name}:{row}"
            else:
                yield _read_document(file, shown, params), name
    except PermissionError as error:
        raise BadData(f"{shown} can't be read: its permissions forbid it") from error


def _open(path: Path, name: str, params: Download) -> IO[bytes]:
    if path.suffix not in (".gz", ".zst"):
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, name, params), _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, which raises BadData if it is damaged or holds too much."""

    def __init__(self, path: Path, name: str, params: Download) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(str(path))  # decompresses by the suffix
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
            raise BadData(f"{self._name} is damaged, or was cut short ({_one_line(error)})") from error
        self._read += len(content)
        if self._read > self._limit:
            raise BadData(
                f"{self._name} holds more than {self._limit // MEGABYTE:,} MB decompressed "
                f"(download.files.{self._key}): remove the file, or raise the limit"
            )
        buffer[: len(content)] = content
        return len(content)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _decode(content: bytes, name: str, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise BadData(
            f"{name}, line {line:,}: byte 0x{byte:02x} is not UTF-8: convert the file (iconv) or remove it"
        ) from error


def _refuse_long(what: str, key: str, megabytes: int) -> NoReturn:
    raise BadData(
        f"{what} is longer than {megabytes:,} MB (download.{key}): cut it into documents, remove it, or "
        "raise the limit"
    )


def _read_document(file: IO[bytes], name: str, params: Download) -> str:
    limit = params.max_document_megabytes * MEGABYTE
    content = file.read(limit + 1)
    if len(content) > limit:
        _refuse_long(name, "max_document_megabytes", params.max_document_megabytes)
    text = _decode(content.removeprefix(_BOM), name)
    if not text.strip():
        raise BadData(f"{name} holds only white space: remove it from the corpus")
    return text


def _read_jsonl(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    limit = params.max_row_megabytes * MEGABYTE
    line = 0
    while content := file.readline(limit + 1):
        line += 1
        if len(content) > limit:
            _refuse_long(f"{name}, line {line:,}", "max_row_megabytes", params.max_row_megabytes)
        if line == 1:
            content = content.removeprefix(_BOM)
        if content.strip():
            yield line, _text_of_json(content, name, line, params.files.text_column)
    if not line:
        raise BadData(f"{name} is empty: remove it from the corpus")


def _text_of_json(content: bytes, name: str, line: int, column: str) -> str:
    where = f"{name}, line {line:,}"
    decoded = _decode(content, name, line)
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where} is not valid JSON ({error}): correct or remove the line") from error
    if not isinstance(row, dict) or column not in row:
        found = f"keys {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
        raise BadData(
            f"{where}: found {found}, expected a JSON object with the text column {column!r}: "
            "set download.files.text_column in params.yaml, or correct the line"
        )
    text = row[column]
    if not isinstance(text, str):
        found = type(text).__name__
        raise BadData(f"{where}: {column!r} is {found}, expected text: correct or remove the line")
    return text


def _read_parquet(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, column = 0, params.files.text_column
    try:
        with (
            TemporaryFile() as temporary,
            _seekable(file, temporary, name, params) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            _check_column(table.schema_arrow, name, column)
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise BadData(f"{name}, row {row:,}: {column!r} is null: correct or remove the row")
                    if len(text) > params.max_row_megabytes * MEGABYTE:
                        what = f"{name}, row {row:,}"
                        _refuse_long(what, "max_row_megabytes", params.max_row_megabytes)
                    yield row, text
    except UnicodeDecodeError as error:
        raise BadData(f"{name}: a text in rows {row + 1:,} to {row + _ROWS:,} is not UTF-8") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{name} is not a valid parquet file, or was cut short ({_one_line(error)})") from error


def _seekable(file: IO[bytes], temporary: IO[bytes], name: str, params: Download) -> IO[bytes]:
    """Return the file or, since parquet is read from its end, `temporary` with its decompressed content."""
    if file.seekable():
        return file
    free_megabytes = params.files.min_free_disk_megabytes
    while chunk := file.read(_CHUNK_BYTES):
        if shutil.disk_usage(temporary.fileno()).free - len(chunk) < free_megabytes * MEGABYTE:
            raise DiskFull(
                f"{name} needs more room to be decompressed than the folder of temporary files has, where "
                f"{free_megabytes:,} MB must stay free (download.files.min_free_disk_megabytes): "
                "free some space, or set TMPDIR to another disk"
            )
        temporary.write(chunk)
    return temporary


def _check_column(schema: Any, name: str, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise BadData(
            f"{name} has columns {schema.names}, none is {column!r}: "
            "set download.files.text_column in params.yaml"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadData(f"{name}: column {column!r} is {kind}, expected text")
