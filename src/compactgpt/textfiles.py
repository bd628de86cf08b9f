"""The user's own text: .txt (one document a file), .jsonl and .parquet (one document a row).

Text is taken as it is, but for a byte-order mark at the start of a file. Every mistake is named with
its file and line.
"""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compactgpt.config import Files
from compactgpt.errors import BadData, MissingInput

_BOM = b"\xef\xbb\xbf"
_ROWS = 256  # of a parquet file, read at a time


def find_files(files: Files, root: Path) -> dict[str, list[str]]:
    """List the files of each pattern, sorted, each file once.

    Returns:
        Pattern -> paths relative to `root`.

    Raises:
        MissingInput: nothing matches, or a pattern without wildcards names a file that is not there.
    """
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for pattern in files.patterns:
        names = sorted(
            Path(name).as_posix()
            for name in glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (follows links)
            if not (root / name).is_dir()
        )
        if not names and not glob.has_magic(pattern):
            raise MissingInput(f"{pattern}, named in download.files.patterns, is missing")
        found[pattern] = [name for name in names if name not in taken]
        taken.update(names)
    if not taken:
        raise MissingInput(
            f"no file matches download.files.patterns ({', '.join(files.patterns)}): "
            "put text there, or mend the patterns in params.yaml"
        )
    return found


def read_texts(root: Path, name: str, column: str) -> Iterator[tuple[str, str]]:
    """Yield (text, source) for each document of one file.

    Raises:
        MissingInput: the file is not there.
        BadData: it is empty, damaged, not UTF-8, or lacks the column.
    """
    path = root / name
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    try:
        if not path.stat().st_size:
            raise BadData(f"{name} is empty: remove it from the corpus")
        yield from read(path, name, column)
    except FileNotFoundError as error:
        raise MissingInput(f"{name} is missing: it is a link to nothing, or was just removed") from error
    except PermissionError as error:
        raise BadData(f"{name} can't be read: its permissions forbid it") from error


def _read_txt(path: Path, name: str, _column: str) -> Iterator[tuple[str, str]]:
    content = path.read_bytes().removeprefix(_BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(_not_utf8(name, line, error)) from error
    if not text.strip():
        raise BadData(f"{name} holds only white space: remove it from the corpus")
    yield text, name


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{name}, line {line:,}: byte 0x{byte:02x} is not UTF-8: convert the file (iconv) or remove it"


def _read_jsonl(path: Path, name: str, column: str) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            content = raw.removeprefix(_BOM) if line == 1 else raw
            if not content.strip():
                continue
            yield _json_text(content, name, line, column), f"{name}:{line}"


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


def _read_parquet(path: Path, name: str, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_column(file.schema_arrow, name, column)
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise BadData(f"{name}, row {row:,}: {column!r} is null: mend or remove the row")
                    yield text, f"{name}:{row}"
    except UnicodeDecodeError as error:
        raise BadData(f"{name}: a text in rows {row + 1:,} to {row + _ROWS:,} is not UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise BadData(f"{name} is no readable parquet file, or was cut short ({message})") from error


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
