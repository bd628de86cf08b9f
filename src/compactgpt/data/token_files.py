"""The token file, training batches and evaluation windows.

A split is two files: `<split>.tokens`, a header and then every document's token ids, each document
closed by the end-of-text token; and `<split>.index.safetensors`, one entry a document:

    offsets  (documents + 1,) int64   document d is tokens[offsets[d] : offsets[d + 1]], end-of-text included
    bytes    (documents,)     int64   length of the document's text in UTF-8 bytes
    ids      (documents, 16)  uint8   first 16 bytes of the SHA-256 of the document's text

The header is one JSON line padded with spaces to HEADER_BYTES, behind a magic of eight bytes. B is a
batch of sequences, T the tokens of one.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import MANIFEST, atomic_file, read_manifest, verify_file, write_bytes

MAGIC = b"CGPTTOK\n"
VERSION = 1
HEADER_BYTES = 1024
Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Header:
    """What a token file says of itself."""

    version: int
    dtype: str  # numpy name: uint16 or uint32, little endian
    tokens: int
    documents: int
    vocab_size: int
    eot_token: int
    tokenizer_sha256: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_header(header: Header) -> bytes:
    """Render a header as the first HEADER_BYTES of a token file."""
    text = json.dumps(header.__dict__, sort_keys=True).encode()
    return MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n"


def read_header(path: Path) -> Header:
    """Read and check a token file's header against the file's size.

    Raises:
        MissingInput: there is no such file.
        BadData: no token file, another version, or cut short.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro tokenization`") from error
    if not raw.startswith(MAGIC) or len(raw) < HEADER_BYTES:
        raise BadData(f"{path} is no token file: run `dvc repro -f tokenization`")
    try:
        fields = json.loads(raw[len(MAGIC) :])
        if fields.get("version") != VERSION:
            raise BadData(
                f"{path} has version {fields.get('version')!r}, this program reads {VERSION}: "
                "run `dvc repro -f tokenization`"
            )
        header = Header(**fields)
        counts = (header.tokens, header.documents, header.vocab_size, header.eot_token)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("a count is none")
        if not header.eot_token < header.vocab_size <= 2**32:
            raise ValueError("no such vocabulary")
        if header.dtype != token_dtype(header.vocab_size).name:
            raise ValueError(f"dtype {header.dtype!r}")
        expected = HEADER_BYTES + header.tokens * np.dtype(header.dtype).itemsize
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"{path} has a damaged header: run `dvc repro -f tokenization`") from error
    if path.stat().st_size != expected:
        raise BadData(
            f"{path} has {path.stat().st_size:,} bytes, its header promises {expected:,}: "
            "it was cut short or altered; run `dvc repro -f tokenization`"
        )
    return header


@dataclass(frozen=True)
class TokenFile:
    """One split, read by memory map."""

    path: Path
    header: Header
    tokens: Tokens  # (tokens,) memory-mapped, read-only
    offsets: npt.NDArray[np.int64]  # (documents + 1,)
    byte_lengths: npt.NDArray[np.int64]  # (documents,)
    ids: npt.NDArray[np.uint8]  # (documents, 16)

    @cached_property
    def document_ids(self) -> list[str]:
        """Hex id of each document."""
        return [row.tobytes().hex() for row in self.ids]

    def document(self, index: int) -> Tokens:
        """Token ids of one document without its end-of-text. (tokens,)"""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]


def index_path(path: Path) -> Path:
    """Where the document index of a token file lies."""
    return path.with_suffix(".index.safetensors")


def open_tokens(path: Path) -> TokenFile:
    """Open a token file and its document index.

    Raises:
        MissingInput: one of the two is missing.
        BadData: one is damaged, or they do not belong together.
    """
    header = read_header(path)
    _verify(path)
    try:
        index = load_file(index_path(path))
        offsets, byte_lengths, ids = index["offsets"], index["bytes"], index["ids"]
    except FileNotFoundError as error:
        raise MissingInput(f"{index_path(path)} is missing: run `dvc repro tokenization`") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadData(f"{index_path(path)} is damaged: run `dvc repro -f tokenization`") from error
    number = header.documents
    fits = (
        (offsets.shape, byte_lengths.shape, ids.shape) == ((number + 1,), (number,), (number, 16))
        and (offsets.dtype.name, byte_lengths.dtype.name, ids.dtype.name) == ("int64", "int64", "uint8")
        and (offsets[0], offsets[-1]) == (0, header.tokens)
        and np.all(np.diff(offsets) >= 1)
        and np.all(byte_lengths >= 0)
    )
    if not fits:
        raise BadData(f"{index_path(path)} does not fit {path}: run `dvc repro -f tokenization`")
    tokens: Tokens = (
        np.memmap(path, mode="r", dtype=header.dtype, offset=HEADER_BYTES, shape=(header.tokens,))
        if header.tokens
        else np.empty(0, header.dtype)
    )
    return TokenFile(path, header, tokens, offsets, byte_lengths, ids)


def _verify(path: Path) -> None:
    """Check a split's two files against the hashes in the manifest beside them, where there is one."""
    manifest = path.parent / MANIFEST
    if not manifest.exists():
        return
    files = read_manifest(path.parent)["files"]
    for each in (path, index_path(path)):
        if each.name not in files:
            raise BadData(f"{manifest} does not name {each.name}: run `dvc repro -f tokenization`")
        verify_file(each, files[each.name]["sha256"], files[each.name]["bytes"])


class TokenWriter:
    """Takes the documents of one split, one by one; made by `token_writer`."""

    def __init__(self, file: IO[bytes], vocab_size: int, eot_token: int) -> None:
        self._file, self._vocab_size = file, vocab_size
        self.dtype = token_dtype(vocab_size)
        self._end_of_text = np.array([eot_token], self.dtype).tobytes()
        # Packed, since a large corpus has millions of documents.
        self._offsets, self._byte_lengths, self._ids = array("q", [0]), array("q"), bytearray()

    def add(self, document_id: bytes, byte_length: int, tokens: Tokens) -> None:
        """Append one document.

        Args:
            document_id: 16 bytes.
            byte_length: of its text, in UTF-8.
            tokens: ids without end-of-text. (tokens,)

        Raises:
            BadData: an id is not below the vocabulary's size.
        """
        if len(tokens) and int(tokens.max()) >= self._vocab_size:
            raise BadData(f"document {document_id.hex()} has a token id not below {self._vocab_size}")
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._file.write(self._end_of_text)
        self._offsets.append(self._offsets[-1] + len(tokens) + 1)
        self._byte_lengths.append(byte_length)
        self._ids += document_id

    @property
    def tokens(self) -> int:
        """Tokens so far, end-of-text included."""
        return self._offsets[-1]

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._byte_lengths)

    def index(self) -> dict[str, npt.NDArray[Any]]:
        """Return the document index, as it is saved."""
        return {
            "offsets": np.array(self._offsets, np.int64),
            "bytes": np.array(self._byte_lengths, np.int64),
            "ids": np.frombuffer(bytes(self._ids), np.uint8).reshape(-1, 16),
        }


@contextmanager
def token_writer(
    path: Path, *, vocab_size: int, eot_token: int, tokenizer_sha256: str
) -> Iterator[TokenWriter]:
    """Write one split in memory bounded by its index; both files appear when the block ends well.

    Args:
        path: the token file; the index goes beside it.
        vocab_size: ids must be below it.
        eot_token: appended to every document.
        tokenizer_sha256: what made the ids.
    """
    with atomic_file(path) as file:
        file.seek(HEADER_BYTES)
        writer = TokenWriter(file, vocab_size, eot_token)
        yield writer
        header = Header(
            VERSION,
            writer.dtype.name,
            writer.tokens,
            writer.documents,
            vocab_size,
            eot_token,
            tokenizer_sha256,
        )
        file.seek(0)
        file.write(encode_header(header))
        write_bytes(index_path(path), save(writer.index()))


def write_tokens(
    path: Path,
    documents: Iterable[tuple[bytes, int, Tokens]],
    *,
    vocab_size: int,
    eot_token: int,
    tokenizer_sha256: str,
) -> Header:
    """Write one split from (16-byte id, length in UTF-8 bytes, token ids) of each document.

    Raises:
        BadData: an id is not below `vocab_size`.
    """
    with token_writer(
        path, vocab_size=vocab_size, eot_token=eot_token, tokenizer_sha256=tokenizer_sha256
    ) as writer:
        for document_id, byte_length, tokens in documents:
            writer.add(document_id, byte_length, tokens)
    return read_header(path)


def training_batch(
    tokens: Tokens, *, seed: int, step: int, sequences: int, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the batch of one step: a pure function of its arguments.

    Sequences start at uniformly random places of the token stream, as in nanoGPT's get_batch; the
    generator is counter-based and keyed by (seed, step), so that no state need be kept or restored.

    Returns:
        tokens and targets, each (sequences, block_size) int64; targets are one place further.

    Raises:
        BadData: the split is shorter than one sequence.
    """
    if len(tokens) <= block_size:
        raise BadData(
            f"the training split has {len(tokens):,} tokens, one sequence needs {block_size + 1:,}: "
            "add text, or lower model.block_size"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - block_size, sequences)
    places = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    drawn = tokens[places].astype(np.int64)
    return drawn[:, :-1], drawn[:, 1:]


@dataclass(frozen=True)
class Window:
    """One evaluation slice of one document: which tokens are fed, and which targets they predict."""

    document: int  # index in the token file
    start: int  # first target's place in the document
    tokens: npt.NDArray[np.int64]  # (T,) fed; the first is end-of-text or the token before `start`
    targets: npt.NDArray[np.int64]  # (T,) scored


def evaluation_windows(split: TokenFile, window: int) -> Iterator[Window]:
    """Cut every document into windows of at most `window` targets, in order, without overlap.

    Every token of every document is a target exactly once. The first window of a document is fed the
    end-of-text token first; end-of-text itself is never a target, since it spells no byte of text.
    """
    eot = split.header.eot_token
    for index in range(split.header.documents):
        stream = np.concatenate([[eot], split.document(index)]).astype(np.int64)
        for start in range(0, len(stream) - 1, window):
            yield Window(
                index,
                start,
                stream[start : start + window][: len(stream) - 1 - start],
                stream[start + 1 : start + window + 1],
            )
