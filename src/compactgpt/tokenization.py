"""Documents -> the token files of data.py: train and val, split by document hash.

The split looks at nothing but a document's id, so that growth of the corpus never moves a document. Text
is encoded as ordinary text: a special token that is spelled in it becomes ordinary tokens. The files are
the same whatever the number of workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from compactgpt.config import Tokenization
from compactgpt.data import TokenFile, Tokens, open_tokens, token_dtype, token_writer
from compactgpt.documents import RowGroup, read_row_group, row_groups
from compactgpt.encoding import load_encoding
from compactgpt.errors import BadData
from compactgpt.parallel import ordered_map
from compactgpt.progress import Progress, silent
from compactgpt.storage import atomic_folder, sha256_file, verified_manifest

__all__ = ["Task", "encode_group", "load_encoding", "split_of", "tokenize"]

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Task:
    """One row group, and the encoding to encode it with."""

    group: RowGroup
    tokenizer: Path
    tokenizer_sha256: str


@dataclass(frozen=True)
class Encoded:
    """One document, ready to be written."""

    id: bytes
    byte_length: int
    tokens: Tokens  # (tokens,) without end-of-text


def split_of(document_id: str, val_fraction: float) -> Split:
    """Decide a document's split by the first 64 bits of its id, read as a fraction of 2^64."""
    return "val" if int(document_id[:16], 16) < val_fraction * 2**64 else "train"


def tokenize(
    documents: Path,
    tokenizer: Path,
    folder: Path,
    params: Tokenization,
    *,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make the folder of token files.

    Args:
        documents: folder of document shards.
        tokenizer: folder of the encoding.
        folder: where train.tokens and val.tokens, each with its index, go; replaced as a whole.
        params: how to split.
        num_workers: processes; the result does not depend on it.
        progress: told the bytes of text done.

    Returns:
        The report: of each split documents, tokens (end-of-text included), bytes of text and hashes.

    Raises:
        MissingInput, BadData: an input is missing or damaged, or a split got no document.
    """
    manifest = verified_manifest(documents)
    facts = _tokenizer_facts(tokenizer)
    tasks = [Task(group, tokenizer, facts["tokenizer_sha256"]) for group in row_groups(documents)]
    with atomic_folder(folder, {**facts, "val_fraction": params.val_fraction}) as temporary:
        _write_splits(temporary, tasks, facts, params.val_fraction, num_workers, progress, manifest["bytes"])
        splits = {split: open_tokens(temporary / f"{split}.tokens") for split in ("train", "val")}
        for split, file in splits.items():
            if not file.header.documents:
                raise BadData(
                    f"no document of {manifest['documents']:,} fell into {split}: change "
                    f"tokenization.val_fraction ({params.val_fraction}) in params.yaml, or add text"
                )
        return {"tokenizer": facts, **{split: _split_report(file) for split, file in splits.items()}}


def _tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Check the encoding once, before any worker loads it."""
    encoding = load_encoding(folder)
    return {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "tokenizer_sha256": verified_manifest(folder)["tokenizer_sha256"],
    }


def _write_splits(
    folder: Path,
    tasks: Sequence[Task],
    facts: Mapping[str, Any],
    val_fraction: float,
    num_workers: int,
    progress: Progress,
    total_bytes: int,
) -> None:
    keys = ("vocab_size", "eot_token", "tokenizer_sha256")
    settings = {key: facts[key] for key in keys}
    done = 0
    with (
        token_writer(folder / "train.tokens", **settings) as train,
        token_writer(folder / "val.tokens", **settings) as val,
    ):
        writers = {"train": train, "val": val}
        for group in ordered_map(encode_group, tasks, num_workers):
            for document in group:
                split = split_of(document.id.hex(), val_fraction)
                writers[split].add(document.id, document.byte_length, document.tokens)
                done += document.byte_length
            progress(done, total_bytes, {"tokens": f"{train.tokens + val.tokens:,}"})


def encode_group(task: Task) -> list[Encoded]:
    """Encode the documents of one row group: a pure function of files on disk, for any process."""
    encoding = _cached_encoding(task.tokenizer, task.tokenizer_sha256)
    dtype = token_dtype(encoding.n_vocab)
    return [
        Encoded(
            bytes.fromhex(document.id),
            len(document.text.encode("utf-8")),
            # No special token is allowed, so that all text is ordinary; no Python list in between.
            encoding.encode_to_numpy(document.text, disallowed_special=()).astype(dtype),
        )
        for document in read_row_group(task.group)
    ]


@lru_cache(maxsize=1)
def _cached_encoding(tokenizer: Path, _sha256: str) -> tiktoken.Encoding:
    """Load the encoding once a process; the hash keeps another one in the same folder apart."""
    return load_encoding(tokenizer)


def _split_report(file: TokenFile) -> dict[str, Any]:
    total_bytes = int(file.byte_lengths.sum())
    lengths = np.diff(file.offsets)
    return {
        "documents": file.header.documents,
        "tokens": file.header.tokens,
        "bytes": total_bytes,
        "bytes_per_token": total_bytes / (file.header.tokens - file.header.documents),
        "longest_document_share": float(lengths.max() / file.header.tokens),
        "sha256": sha256_file(file.path),
    }
