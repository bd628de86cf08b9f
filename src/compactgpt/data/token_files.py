"""Write and read token files, and cut them into training batches and evaluation windows.

A token file `<split>.tokens` contains the token ids of all documents of a split, after a header of
HEADER_BYTES bytes. The header is MAGIC and one line of JSON, padded with spaces. Each document ends with the
end-of-text token. The document index `<split>.index.safetensors` has the arrays of `TokenFile`.
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

# The names of the two files of a GPT-2 tokenizer, and the token that ends each document.
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
    """The facts in the header of a token file, as JSON stores them."""

    version: int
    dtype: str  # numpy type of the stored token ids: uint16 or uint32, in little-endian byte order
    tokens: Count  # number of tokens in the file, end-of-text tokens included
    documents: Count
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    eot_token: Count  # id of the end-of-text token
    tokenizer_sha256: str


_HEADER = TypeAdapter(Header)  # parses the JSON of a header, and checks the types of the values


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned integer type that can store every token id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def index_path(path: Path) -> Path:
    """Return the path of the document index that belongs to the token file at `path`."""
    return path.with_suffix(".index.safetensors")


@dataclass(frozen=True)
class TokenFile:
    """The tokens and the document index of one split, in memory or in files."""

    path: Path
    header: Header
    tokens: Tokens  # (tokens,) read-only token ids; memory-mapped if they are stored in a file
    # Document d, with its end-of-text token, is tokens[offsets[d] : offsets[d + 1]].
    offsets: Lengths  # (documents + 1,) indices in `tokens`
    byte_lengths: Lengths  # (documents,) length of each document in UTF-8 bytes
    ids: npt.NDArray[np.uint8]  # (documents, 16) first bytes of the SHA-256 of each document's text

    @cached_property
    def document_ids(self) -> list[str]:
        """The id of each document, as a string of 32 hex digits."""
        return [row.tobytes().hex() for row in self.ids]

    def document(self, index: int) -> Tokens:
        """Return the token ids of document number `index` without the end-of-text token, shape (tokens,)."""
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
    """Append the end-of-text token to each document, join the documents, and return a TokenFile in memory.

    A document is a tuple of its 16-byte id, its length in UTF-8 bytes, and its token ids. No file is written;
    `path` is stored in the TokenFile. Raises BadData if a token id is `vocab_size` or greater.
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
    # Check the ids before `astype` below, which would change a large id without an error.
    if len(joined) and int(joined.max()) >= vocab_size:
        raise BadData(
            f"a document has the token id {int(joined.max())}, but the tokenizer has only {vocab_size} ids: "
            "run `dvc repro -f download` to write the tokenizer again"
        )
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
    """Join `parts` into one token file at `path`, write the document index, and return the header.

    The index takes 32 bytes of memory per document. The tokens of the parts are not loaded into memory.
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
    """Return the header as the first HEADER_BYTES bytes of a token file."""
    text = json.dumps(asdict(header), sort_keys=True).encode()
    return MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n"


# --- reading


def open_tokens(path: Path, *, verify: bool = True) -> TokenFile:
    """Open a token file and its document index.

    If `verify` is true and the folder has a manifest, the two files must have the hashes in the manifest.
    Raises MissingInput if a file is missing, BadData if a file is damaged or the index is of another file.
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
                raise _damaged(path.parent / MANIFEST, f"has no hash of the file {each.name}")
            verify_file(each, files[each.name]["sha256"], files[each.name]["bytes"])
    try:
        index = load_file(index_file)
        offsets, byte_lengths, ids = index["offsets"], index["bytes"], index["ids"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(index_file, "is damaged, and can't be read as a document index") from error
    number = header.documents
    fits = (
        (offsets.shape, byte_lengths.shape, ids.shape) == ((number + 1,), (number,), (number, 16))
        and (offsets.dtype.name, byte_lengths.dtype.name, ids.dtype.name) == ("int64", "int64", "uint8")
        and (offsets[0], offsets[-1]) == (0, header.tokens)
        and np.all(np.diff(offsets) >= 1)
        and np.all(byte_lengths >= 0)
    )
    if not fits:
        raise _damaged(index_file, f"does not fit the token file {path}")
    tokens: Tokens = np.empty(0, header.dtype)  # np.memmap can't map a file without tokens
    if header.tokens:
        tokens = np.memmap(path, mode="r", dtype=header.dtype, offset=HEADER_BYTES, shape=(header.tokens,))
    return TokenFile(path, header, tokens, offsets, byte_lengths, ids)


def _read_header(path: Path) -> Header:
    """Return the header of a token file. Raises BadData if the header or the size of the file is wrong."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if not raw.startswith(MAGIC) or len(raw) < HEADER_BYTES:
        raise _damaged(path, "is not a token file, which must begin with a header")
    try:
        header = _HEADER.validate_json(raw[len(MAGIC) :])
    except ValidationError as error:
        raise _damaged(path, "has a damaged header") from error
    if header.version != VERSION:
        raise _damaged(path, f"has format version {header.version}, but this program reads version {VERSION}")
    dtype = token_dtype(header.vocab_size)
    if header.dtype != dtype.name or header.eot_token >= header.vocab_size:
        raise _damaged(path, "has a damaged header")
    size, expected = path.stat().st_size, HEADER_BYTES + header.tokens * dtype.itemsize
    if size != expected:
        what = f"has {size:,} bytes, but its header says {expected:,}. The file was cut short or altered"
        raise _damaged(path, what)
    return header


def _damaged(path: Path, what: str) -> BadData:
    return BadData(f"{path} {what}: run `dvc repro -f tokenization`")


# --- batches and windows


def training_batch(
    tokens: Tokens, *, seed: int, step: int, sequences: int, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the batch of one training step: the input tokens (B, T) and the target tokens (B, T), as int64.

    `tokens` are all tokens of the train split. The target of a token is the next token. A sequence starts at
    a random index in `tokens`, as in nanoGPT's get_batch. The result depends only on the arguments, so a
    resumed training needs no state of a random generator.
    Raises BadData if `tokens` is too short for one sequence.
    """
    if len(tokens) <= block_size:
        raise BadData(
            f"the train split has {len(tokens):,} tokens, but one sequence needs {block_size + 1:,}: "
            "add text, or lower model.block_size in params.yaml"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - block_size, sequences)
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    drawn = tokens[positions].astype(np.int64)
    return drawn[:, :-1], drawn[:, 1:]


@dataclass(frozen=True)
class Window:
    """A part of one document: the tokens that a model reads, and the tokens that the model must predict."""

    document: int  # number of the document in the token file, from 0
    start: int  # index of the first target among the tokens of the document
    tokens: npt.NDArray[np.int64]  # (T,) tokens to read, which begin one token before `targets`
    targets: npt.NDArray[np.int64]  # (T,) the next token of each token in `tokens`


def evaluation_windows(split: TokenFile, window: int) -> Iterator[Window]:
    """Cut every document into windows of at most `window` targets, and yield the windows in document order.

    Every token of every document is a target exactly once. The first window of a document begins with the
    end-of-text token. The end-of-text token is never a target, since it encodes no text.
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
