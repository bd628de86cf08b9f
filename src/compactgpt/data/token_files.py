"""Token files, training batches and evaluation windows.

A split has two files. `<split>.tokens` contains a header and the token ids of all documents. Each document
ends with the end-of-text token. `<split>.index.safetensors` has one entry per document: see `TokenFile`.
The header is MAGIC and one line of JSON, padded with spaces to HEADER_BYTES.
Shapes: B sequences in a batch, T tokens in a sequence.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import MANIFEST, atomic_file, read_manifest, verify_file, write_bytes

# The files of a GPT-2 tokenizer, and its token between documents.
VOCAB_BPE = "vocab.bpe"
ENCODER_JSON = "encoder.json"
END_OF_TEXT = "<|endoftext|>"

MAGIC = b"CGPTTOK\n"
VERSION = 1
HEADER_BYTES = 1024
Tokens = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]
Count = Annotated[int, Field(ge=0)]


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class Header:
    """The header of a token file."""

    version: int
    dtype: str  # numpy name of the ids' type: uint16 or uint32; stored in little-endian order
    tokens: Count
    documents: Count
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    eot_token: Count
    tokenizer_sha256: str


_HEADER = TypeAdapter(Header)  # parses the header's JSON, and checks the types


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned numpy type for token ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def index_path(path: Path) -> Path:
    """Return the path of a token file's document index."""
    return path.with_suffix(".index.safetensors")


@dataclass(frozen=True)
class TokenFile:
    """One split: its tokens and its document index, in memory or in two files."""

    path: Path
    header: Header
    tokens: Tokens  # (tokens,) read-only; memory-mapped if the tokens are in a file
    # Document d is tokens[offsets[d] : offsets[d + 1]], end-of-text included.
    offsets: Lengths  # (documents + 1,)
    byte_lengths: Lengths  # (documents,) length of each document's text in UTF-8 bytes
    ids: npt.NDArray[np.uint8]  # (documents, 16) first bytes of the SHA-256 of each document's text

    @cached_property
    def document_ids(self) -> list[str]:
        """The id of each document as 32 hex digits."""
        return [row.tobytes().hex() for row in self.ids]

    def document(self, index: int) -> Tokens:
        """Return the token ids of one document without its end-of-text. (tokens,)"""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]


# --- writing


def pack_documents(
    path: Path,
    documents: Iterable[tuple[bytes, int, Tokens]],
    *,
    vocab_size: int,
    eot_token: int,
    tokenizer_sha256: str,
) -> TokenFile:
    """Return a split in memory: append end-of-text to each document, and join the documents.

    A document is a tuple of its 16-byte id, its length in UTF-8 bytes, and its token ids. `path` names the
    split in messages. Raises BadData if a token id is not below `vocab_size`.
    """
    ids: list[bytes] = []
    byte_lengths: list[int] = []
    lengths = [0]
    closed: list[Tokens] = [np.empty(0, np.uint32)]
    for document_id, byte_length, tokens in documents:
        ids.append(document_id)
        byte_lengths.append(byte_length)
        lengths.append(len(tokens) + 1)
        closed += [tokens, np.array([eot_token], np.uint32)]
    joined = np.concatenate(closed)
    # Check before the cast: a cast to a smaller type would change a large id without an error.
    if len(joined) and int(joined.max()) >= vocab_size:
        raise BadData(f"a document has the token id {int(joined.max())}, which is not below {vocab_size}")
    dtype = token_dtype(vocab_size)
    header = Header(
        VERSION, dtype.name, len(joined), len(byte_lengths), vocab_size, eot_token, tokenizer_sha256
    )
    return TokenFile(
        path,
        header,
        joined.astype(dtype),
        np.cumsum(lengths, dtype=np.int64),
        np.array(byte_lengths, np.int64),
        np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16),
    )


def write_tokens(path: Path, parts: Sequence[TokenFile]) -> Header:
    """Join the documents of one or more splits into a token file and its document index; return the header.

    Memory holds 32 bytes per document for the index. Tokens are copied from file to file.
    """
    lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
    index = {
        "offsets": np.concatenate(lengths).cumsum(),
        "bytes": np.concatenate([part.byte_lengths for part in parts]),
        "ids": np.concatenate([part.ids for part in parts]),
    }
    documents, tokens = len(index["bytes"]), int(index["offsets"][-1])
    header = replace(parts[0].header, documents=documents, tokens=tokens)
    with atomic_file(path) as file:
        file.write(encode_header(header))
        for part in parts:
            file.write(part.tokens.data)
        write_bytes(index_path(path), save(index))
    return header


def encode_header(header: Header) -> bytes:
    """Return the first HEADER_BYTES bytes of a token file."""
    text = json.dumps(asdict(header), sort_keys=True).encode()
    return MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n"


# --- reading


def open_tokens(path: Path, *, verify: bool = True) -> TokenFile:
    """Open a token file and its document index.

    If `verify` is true and the folder has a manifest, both files are compared with the manifest's hashes.
    Raises MissingInput if a file is missing, BadData if a file is damaged or the two do not fit each other.
    """
    index_file = index_path(path)
    for each in (path, index_file):
        if not each.exists():
            raise MissingInput(f"{each} is missing: run `dvc repro tokenization`")
    header = _read_header(path)
    if verify and (path.parent / MANIFEST).exists():
        files = read_manifest(path.parent)["files"]
        for each in (path, index_file):
            if each.name not in files:
                raise _damaged(path.parent / MANIFEST, f"does not name {each.name}")
            verify_file(each, files[each.name]["sha256"], files[each.name]["bytes"])
    try:
        index = load_file(index_file)
        offsets, byte_lengths, ids = index["offsets"], index["bytes"], index["ids"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(index_file, "is damaged") from error
    number = header.documents
    fits = (
        (offsets.shape, byte_lengths.shape, ids.shape) == ((number + 1,), (number,), (number, 16))
        and (offsets.dtype.name, byte_lengths.dtype.name, ids.dtype.name) == ("int64", "int64", "uint8")
        and (offsets[0], offsets[-1]) == (0, header.tokens)
        and np.all(np.diff(offsets) >= 1)
        and np.all(byte_lengths >= 0)
    )
    if not fits:
        raise _damaged(index_file, f"does not fit {path}")
    tokens: Tokens = np.empty(0, header.dtype)  # an empty file can't be mapped
    if header.tokens:
        tokens = np.memmap(path, mode="r", dtype=header.dtype, offset=HEADER_BYTES, shape=(header.tokens,))
    return TokenFile(path, header, tokens, offsets, byte_lengths, ids)


def _read_header(path: Path) -> Header:
    """Return a token file's header, after a check that the header fits the file's size."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if not raw.startswith(MAGIC) or len(raw) < HEADER_BYTES:
        raise _damaged(path, "is not a token file")
    try:
        header = _HEADER.validate_json(raw[len(MAGIC) :])
    except ValidationError as error:
        raise _damaged(path, "has a damaged header") from error
    if header.version != VERSION:
        raise _damaged(path, f"has version {header.version}, this program reads {VERSION}")
    dtype = token_dtype(header.vocab_size)
    if header.dtype != dtype.name or header.eot_token >= header.vocab_size:
        raise _damaged(path, "has a damaged header")
    size, expected = path.stat().st_size, HEADER_BYTES + header.tokens * dtype.itemsize
    if size != expected:
        what = f"has {size:,} bytes, its header says {expected:,}: it was cut short or altered"
        raise _damaged(path, what)
    return header


def _damaged(path: Path, what: str) -> BadData:
    return BadData(f"{path} {what}: run `dvc repro -f tokenization`")


# --- batches and windows


def training_batch(
    tokens: Tokens, *, seed: int, step: int, sequences: int, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw the batch of one training step: tokens and targets, each (B, T) int64.

    The target of a token is the next token of the stream. Sequences start at uniformly random positions of
    the stream, as in nanoGPT's get_batch. The function is pure: the random generator is counter-based with
    the key (seed, step), so a resumed run needs no generator state.
    Raises BadData if the split is shorter than one sequence.
    """
    if len(tokens) <= block_size:
        raise BadData(
            f"the training split has {len(tokens):,} tokens, one sequence needs {block_size + 1:,}: "
            "add text, or lower model.block_size"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - block_size, sequences)
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    drawn = tokens[positions].astype(np.int64)
    return drawn[:, :-1], drawn[:, 1:]


@dataclass(frozen=True)
class Window:
    """A slice of one document: the tokens that a model reads, and the targets that it predicts."""

    document: int  # index in the token file
    start: int  # position of the first target in the document
    tokens: npt.NDArray[np.int64]  # (T,) input; the first is end-of-text or the token before `start`
    targets: npt.NDArray[np.int64]  # (T,) tokens to predict


def evaluation_windows(split: TokenFile, window: int) -> Iterator[Window]:
    """Cut every document into windows of at most `window` targets, in order, without overlap.

    Every token of every document is a target exactly once. The input of a document's first window begins
    with the end-of-text token. End-of-text is never a target, since it encodes no text.
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
