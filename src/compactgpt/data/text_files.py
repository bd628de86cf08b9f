"""The user's own text files as a corpus.

A .txt or .md file is one document. A .jsonl or .parquet file has one document per row. Files may be
compressed (.gz or .zst). The text is not changed, except that a byte-order mark at the start of a file is
removed. Error messages contain the file and the line. Memory holds the names of all files and one document.
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
from typing import IO, Any

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, DiskFull, MissingInput, printable
from compactgpt.config import Download
from compactgpt.data.documents import MEGABYTE, Corpus, Part, Text
from compactgpt.data.inputs import refuse_linked_folders, regular_status, require_utf8

_BOM = b"\xef\xbb\xbf"
_ROWS = 16  # rows of a parquet file read at a time; few, since a row may be long
_CHUNK_BYTES = 2**20
_ANY_RATIO_BYTES = 2**24  # decompressed size allowed at any ratio, since a small file is harmless


def file_corpus(params: Download, root: Path, progress: Progress) -> Corpus:
    """Return the files that match `download.files.patterns` in the folder `root` as a corpus.

    Raises:
        MissingInput: a file is missing, or no file matches.
        BadData: a file name is not UTF-8, or a path is not a regular file.
    """
    names = list_files(params.files.patterns, root)
    stats = [regular_status(root / name, printable(name)) for _, name in names]

    def read(position: Any) -> Iterator[Text]:
        first, done = position or (0, 0)  # index of the first file, and how many of its texts to skip
        for number in range(first, len(names)):
            part, name = names[number]
            for count, (text, source) in enumerate(read_file(root, name, params), 1):
                if number > first or count > done:  # skip the texts of the first file that were read
                    yield Text(text, source, part, [number, count])
            progress(number + 1, len(names))

    rules = params.model_dump(mode="json", include={"files", "max_document_megabytes", "max_row_megabytes"})
    # A changed file changes the identity, and the corpus is read again from its start.
    identity = [rules, names, [[each.st_size, each.st_mtime_ns] for each in stats]]
    return Corpus("files", identity, [Part(pattern) for pattern in params.files.patterns], read)


# --- finding files


def list_files(patterns: Sequence[str], root: Path) -> list[tuple[int, str]]:
    """Return (index of the pattern, path relative to `root`) of each file, sorted by pattern and path.

    Raises:
        MissingInput: no file matches, or a pattern without wildcards is the path of a missing file.
        BadData: a file name is not UTF-8.
    """
    found: dict[str, int] = {}  # in the order in which the files are read
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
    """Yield the paths that match a pattern, like `glob.glob`. A link to a folder raises BadData."""
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
                yield path.relative_to(root).as_posix()


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


def read_file(root: Path, name: str, params: Download) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of each document of the file `name`, which is relative to `root`.

    Raises:
        MissingInput: the file is missing.
        BadData: the file is empty, damaged or not UTF-8, has no text column, or exceeds a limit in `params`.
        DiskFull: there is not enough space to decompress a parquet file.
    """
    path, shown = root / name, printable(name)
    if not regular_status(path, shown).st_size:
        raise BadData(f"{shown} is empty: remove it from the corpus")
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    read = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_document)
    with _open(path, shown, params) as file:
        for row, text in read(file, shown, params):
            yield text, f"{name}:{row}" if row else name


def _open(path: Path, name: str, params: Download) -> IO[bytes]:
    if path.suffix not in (".gz", ".zst"):
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path, name, params), _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file.

    Reading raises BadData if the file is damaged or its content is larger than allowed.
    """

    def __init__(self, path: Path, name: str, params: Download) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(str(path))  # selects the decompression by the suffix
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


def _decode(content: bytes, name: str, line: int = 1) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        byte = f"byte 0x{content[error.start]:02x}"
        raise BadData(
            f"{name}, line {line:,}: {byte} is not UTF-8: convert the file (iconv) or remove it"
        ) from error


def _check_size(size: int, what: str, key: str, params: Download) -> None:
    megabytes = getattr(params, key)
    if size > megabytes * MEGABYTE:
        raise BadData(
            f"{what} is longer than {megabytes:,} MB (download.{key}): cut it into documents, remove it, or "
            "raise the limit"
        )


# Each reader yields (row number from 1, text). The row number is 0 if the file is one document.


def _read_document(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    content = file.read(params.max_document_megabytes * MEGABYTE + 1)  # one byte more than the limit
    _check_size(len(content), name, "max_document_megabytes", params)
    text = _decode(content.removeprefix(_BOM), name)
    if not text.strip():
        raise BadData(f"{name} holds only white space: remove it from the corpus")
    yield 0, text


def _read_jsonl(file: IO[bytes], name: str, params: Download) -> Iterator[tuple[int, str]]:
    line = 0
    while content := file.readline(params.max_row_megabytes * MEGABYTE + 1):
        line += 1
        _check_size(len(content), f"{name}, line {line:,}", "max_row_megabytes", params)
        if line == 1:
            content = content.removeprefix(_BOM)
        if content.strip():
            yield line, _text_of_json(content, name, line, params.files.text_column)
    if not line:  # a compressed file may have no content
        raise BadData(f"{name} is empty: remove it from the corpus")


def _text_of_json(content: bytes, name: str, line: int, column: str) -> str:
    where = f"{name}, line {line:,}"
    decoded = _decode(content, name, line)
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
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
            # Raise an error if a page's checksum differs. Files without checksums are accepted.
            pq.ParquetFile(source, page_checksum_verification=True) as table,
        ):
            _check_column(table.schema_arrow, name, column)
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
        problem = f"is not a valid parquet file, or was cut short ({_one_line(error)})"
        raise BadData(f"{name} {problem}") from error


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
