"""Write and read token files, and cut them into training batches and evaluation windows.

Shapes: B sequences in a batch, T tokens in a sequence.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import MANIFEST, atomic_file, read_manifest, verify_file, write_bytes

# The file names of a GPT-2 tokenizer, and the token that ends each document.
VOCAB_BPE = "vocab.bpe"
ENCODER_JSON = "encoder.json"
END_OF_TEXT = "<|endoftext|>"

# A token file has a header of MAGIC and one line of JSON, and then the token ids of all documents.
MAGIC = b"CGPTTOK\n"
HEADER_BYTES = 1024  # number of bytes in the header, padded with spaces
INDEX = ".index.safetensors"  # the suffix of a document index: `val.tokens` has `val.index.safetensors`
Tokens = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]
# (index of a document, one array of token ids: the start token, then the tokens of the document)
Stream = tuple[int, npt.NDArray[np.int64]]


class Header(BaseModel, frozen=True, strict=True):
    """The JSON object in the header of a token file."""

    version: Literal[1] = 1  # version of the file format
    dtype: Literal["uint16", "uint32"]  # numpy type of the stored token ids
    tokens: NonNegativeInt  # number of tokens in the file, end-of-text tokens included
    documents: NonNegativeInt
    vocab_size: PositiveInt
    eot_token: Annotated[int, Field(ge=0, lt=2**32)]  # id of the end-of-text token
    tokenizer_sha256: str


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
    """Return a TokenFile in memory, with an end-of-text token after each document.

    A document is (16-byte id, length in UTF-8 bytes, token ids). Nothing is written to `path`.
    """
    rows = list(documents)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 2**16 else "uint32"
    closed = [np.append(tokens, eot_token).astype(dtype) for _, _, tokens in rows]
    joined = np.concatenate([np.empty(0, dtype), *closed])
    ids = b"".join(document_id for document_id, _, _ in rows)
    header = Header(
        dtype=dtype,
        tokens=len(joined),
        documents=len(rows),
        vocab_size=vocab_size,
        eot_token=eot_token,
        tokenizer_sha256=tokenizer_sha256,
    )
    return TokenFile(
        path,
        header,
        joined,
        np.cumsum([0, *map(len, closed)], dtype=np.int64),
        np.array([byte_length for _, byte_length, _ in rows], np.int64),
        np.frombuffer(ids, np.uint8).reshape(-1, 16),
    )


def write_tokens(path: Path, files: Sequence[TokenFile]) -> None:
    """Join `files` into one token file at `path`, and write the document index of the new file.

    Only this index is loaded into memory: 32 bytes per document.
    """
    lengths = [np.zeros(1, np.int64), *(np.diff(each.offsets) for each in files)]
    index = {
        "offsets": np.concatenate(lengths).cumsum(),
        "bytes": np.concatenate([each.byte_lengths for each in files]),
        "ids": np.concatenate([each.ids for each in files]),
    }
    sizes = {"documents": len(index["bytes"]), "tokens": int(index["offsets"][-1])}
    header = files[0].header.model_copy(update=sizes)
    text = json.dumps(header.model_dump(), sort_keys=True).encode()
    with atomic_file(path) as file:
        file.write(MAGIC + text.ljust(HEADER_BYTES - len(MAGIC) - 1) + b"\n")
        for each in files:
            file.write(each.tokens.data)
        write_bytes(path.with_suffix(INDEX), save(index))


# --- reading


def open_tokens(path: Path, *, verify: bool = True) -> TokenFile:
    """Open a token file and its document index.

    With `verify`, both files must have the hashes in their folder's manifest, if the folder has a manifest.
    Raises MissingInput if a file is missing, and BadData if a file is damaged.
    """
    index_file = path.with_suffix(INDEX)
    for each in (path, index_file):
        if not each.exists():
            raise MissingInput(f"{each} is missing: run `dvc repro tokenization`")
    if verify and (path.parent / MANIFEST).exists():
        files = read_manifest(path.parent)["files"]
        for each in (path, index_file):
            verify_file(each, files[each.name])
    try:
        return _read(path, index_file)
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadData(
            f"{path} or {index_file.name} is damaged, or the two files do not belong together: "
            "run `dvc repro -f tokenization`"
        ) from error


def _read(path: Path, index_file: Path) -> TokenFile:
    with open(path, "rb") as file:
        header = Header.model_validate_json(file.read(HEADER_BYTES).removeprefix(MAGIC))
    tokens = np.memmap(path, np.uint8, "r")[HEADER_BYTES:].view(header.dtype)
    index = load_file(index_file)
    arrays = [index[name] for name in ("offsets", "bytes", "ids")]
    number = header.documents
    shapes = [("int64", (number + 1,)), ("int64", (number,)), ("uint8", (number, 16))]
    if [(array.dtype.name, array.shape) for array in arrays] != shapes:
        raise ValueError("the types or shapes of the index arrays do not match the header")
    if not len(tokens) == header.tokens == arrays[0][-1]:
        raise ValueError("the file, the header and the index have different numbers of tokens")
    return TokenFile(path, header, tokens, *arrays)


# --- batches and windows


def training_batch(
    tokens: Tokens, *, seed: int, step: int, sequences: int, block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the input tokens (B, T) and target tokens (B, T) of one training step.

    Raises BadData if `tokens` is too short for one sequence.
    """
    if len(tokens) <= block_size:
        raise BadData(
            f"the train split has {len(tokens):,} tokens, but one sequence needs {block_size + 1:,}: "
            "add text, or lower model.block_size in params.yaml"
        )
    # The result depends on the arguments alone, so a resumed training needs no random state.
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - block_size, sequences)  # random, as in nanoGPT's get_batch
    positions = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    drawn = tokens[positions].astype(np.int64)
    return drawn[:, :-1], drawn[:, 1:]  # the target of a token is the next token


@dataclass(frozen=True)
class Window:
    """A part of one document: the tokens that a model reads, and the tokens to predict."""

    document: int  # number of the document in the token file, from 0
    tokens: npt.NDArray[np.int64]  # (T,) the tokens that the model reads
    targets: npt.NDArray[np.int64]  # (T,) the tokens to predict: the next token of each of `tokens`


def evaluation_windows(split: TokenFile, window: int) -> Iterator[Window]:
    """Cut every document into windows of at most `window` targets.

    Each token of a document is a target exactly once. The end-of-text token is never a target.
    """
    return cut_windows(document_streams(split), window)


def document_streams(split: TokenFile) -> Iterator[Stream]:
    """Yield the index and the tokens of each document. The end-of-text token is the start token."""
    for index in range(split.header.documents):
        yield index, np.concatenate([[split.header.eot_token], split.document(index)]).astype(np.int64)


def cut_windows(streams: Iterable[Stream], window: int) -> Iterator[Window]:
    """Cut each document's tokens into windows of at most `window` targets. Windows do not overlap."""
    for document, stream in streams:
        for start in range(0, len(stream) - 1, window):
            end = min(start + window, len(stream) - 1)
            yield Window(document, stream[start:end], stream[start + 1 : end + 1])
