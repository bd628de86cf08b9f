"""Token files that grow piece by piece and survive a kill: nothing is written twice.

A piece is what one worker makes of one row group: for each split the columns below. They are appended to
one file a column; a line of `journal.jsonl` then says how long the files are and what the piece's SHA-256
is. A run that was killed leaves files that are longer than the journal says, or a torn last line: both
are cut back. A piece whose bytes no longer have their hash is named, and made again with all after it.

    <split>.tokens      header space, then token ids, each document closed by end-of-text
    <split>.lengths     int64, tokens of each document, end-of-text included
    <split>.bytes       int64, length of its text in UTF-8
    <split>.ids         16 bytes, its id

At the end the token files are linked, not copied, into the folder that is published, and the index is
written from the other columns in bounded memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import IO, Any

import numpy as np

from compactgpt.data import HEADER_BYTES, VERSION, Header, encode_header, index_path, token_dtype
from compactgpt.storage import atomic_file, tensors_header

SPLITS = ("train", "val")
COLUMNS = ("tokens", "lengths", "bytes", "ids")
JOURNAL = "journal.jsonl"
_COPY_BYTES = 2**22
Column = bytes | Path  # a column in memory, or a file of it that may be deleted


@dataclass(frozen=True)
class Piece:
    """What one worker makes of one row group."""

    columns: Mapping[str, Mapping[str, Column]]  # by split, by name
    sha256: str
    text_bytes: int


@dataclass(frozen=True)
class State:
    """How long the files are after some pieces."""

    pieces: int
    sizes: Mapping[str, Mapping[str, int]]  # bytes, by split, by column
    text_bytes: int


EMPTY = State(
    0,
    {split: {column: HEADER_BYTES if column == "tokens" else 0 for column in COLUMNS} for split in SPLITS},
    0,
)


def piece_sha256(columns: Mapping[str, Mapping[str, Column]]) -> str:
    """Hash a piece's columns, in bounded memory."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name in COLUMNS:
            for block in _blocks(columns[split][name]):
                digest.update(block)
    return digest.hexdigest()


def _blocks(column: Column) -> Iterator[bytes]:
    if isinstance(column, bytes):
        yield column
        return
    with open(column, "rb") as file:
        while block := file.read(_COPY_BYTES):
            yield block


class Ledger:
    """The growing files; made by `open_ledger`."""

    def __init__(self, folder: Path, state: State, damaged: str) -> None:
        self.folder = folder
        self.state = state
        self.damaged = damaged  # a sentence, or empty
        self._files = {
            (split, name): _open_at(folder / f"{split}.{name}", state.sizes[split][name])
            for split in SPLITS
            for name in COLUMNS
        }
        self._journal = open(folder / JOURNAL, "ab")  # noqa: SIM115 (closed by `close`)

    def add(self, piece: Piece) -> None:
        """Append a piece, then its line of the journal."""
        sizes: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            sizes[split] = {}
            for name in COLUMNS:
                file = self._files[split, name]
                for block in _blocks(piece.columns[split][name]):
                    file.write(block)
                file.flush()
                sizes[split][name] = file.tell()
        self.state = State(self.state.pieces + 1, sizes, self.state.text_bytes + piece.text_bytes)
        line = {"pieces": self.state.pieces, "sizes": sizes, "text_bytes": self.state.text_bytes}
        self._journal.write(_journal_line({**line, "sha256": piece.sha256}))
        self._journal.flush()
        for columns in piece.columns.values():
            for column in columns.values():
                if isinstance(column, Path):
                    column.unlink(missing_ok=True)

    def publish(self, folder: Path, split: str, header: Mapping[str, Any]) -> Header:
        """Finish one split as `folder/<split>.tokens` and its index.

        Args:
            folder: where the finished files go.
            split: train or val.
            header: vocab_size, eot_token, tokenizer_sha256.
        """
        dtype = token_dtype(header["vocab_size"])
        sizes = self.state.sizes[split]
        tokens = (sizes["tokens"] - HEADER_BYTES) // dtype.itemsize
        made = Header(VERSION, dtype.name, tokens, sizes["bytes"] // 8, **header)
        file = self._files[split, "tokens"]
        file.seek(0)
        file.write(encode_header(made))
        file.flush()
        target = folder / f"{split}.tokens"
        _link(self.folder / f"{split}.tokens", target)
        write_index(index_path(target), *(self.folder / f"{split}.{name}" for name in COLUMNS[1:]))
        return made

    def close(self) -> None:
        """Close the files."""
        for file in [*self._files.values(), self._journal]:
            file.close()


def _journal_line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _open_at(path: Path, size: int) -> IO[bytes]:
    path.touch()
    file = open(path, "r+b")  # noqa: SIM115 (closed by the ledger)
    file.truncate(size)
    file.seek(size)
    return file


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


@contextmanager
def open_ledger(folder: Path) -> Iterator[Ledger]:
    """Open a ledger where a killed run left it, or an empty one; every kept byte has its hash checked."""
    folder.mkdir(parents=True, exist_ok=True)
    state, lines, damaged = _verified(folder)
    with atomic_file(folder / JOURNAL) as file:
        file.writelines(lines)
    ledger = Ledger(folder, state, damaged)
    try:
        yield ledger
    finally:
        ledger.close()


def _verified(folder: Path) -> tuple[State, list[bytes], str]:
    """Read the journal up to the first line that is torn, or whose piece is not there as it was written."""
    state, lines = EMPTY, list[bytes]()
    journal = folder / JOURNAL
    for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
        try:
            fields = json.loads(line)
            after = _state(fields)
            good = after.pieces == state.pieces + 1 and line.endswith(b"\n")
            whole = good and _stored_sha256(folder, state, after) == fields["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError, OSError):
            return state, lines, ""  # the torn end of a killed run
        if not whole:
            return state, lines, f"piece {state.pieces + 1:,} in {folder} was altered: made again"
        state = after
        lines.append(line)
    return state, lines, ""


def _state(fields: Mapping[str, Any]) -> State:
    sizes = {split: {name: index(fields["sizes"][split][name]) for name in COLUMNS} for split in SPLITS}
    return State(index(fields["pieces"]), sizes, index(fields["text_bytes"]))


def _stored_sha256(folder: Path, before: State, after: State) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for name in COLUMNS:
            with open(folder / f"{split}.{name}", "rb") as file:
                file.seek(before.sizes[split][name])
                left = after.sizes[split][name] - before.sizes[split][name]
                if left < 0:
                    raise ValueError("a file grows")
                while left > 0 and (block := file.read(min(left, _COPY_BYTES))):
                    digest.update(block)
                    left -= len(block)
    return digest.hexdigest()


def write_index(path: Path, lengths: Path, byte_lengths: Path, ids: Path) -> None:
    """Write a document index (data.py) from its columns on disk, as safetensors' own writer would."""
    documents = byte_lengths.stat().st_size // 8
    header = tensors_header([
        ("bytes", "I64", [documents], 8 * documents),
        ("offsets", "I64", [documents + 1], 8 * (documents + 1)),
        ("ids", "U8", [documents, 16], 16 * documents),
    ])  # fmt: skip
    with atomic_file(path) as file:
        file.write(header)
        file.writelines(_blocks(byte_lengths))
        end = np.zeros(1, "<i8")
        file.write(end.tobytes())
        for block in _blocks(lengths):  # blocks are multiples of 8 bytes
            ends = end + np.cumsum(np.frombuffer(block, "<i8"))
            file.write(ends.astype("<i8").tobytes())
            end = ends[-1:]
        file.writelines(_blocks(ids))
