"""Documents -> the token files of data.py: train and val, split by document hash.

The split looks at nothing but a document's id, so that growth of the corpus never moves a document. Text
is encoded as ordinary text: a special token that is spelled in it becomes ordinary tokens. One row group
of the documents is one piece of work, a pure function of files; pieces are appended in their order
(ledger.py), so that the files are the same whatever the number of workers, the engine, and how often
the run was killed. Memory is bounded: a few MiB of text are read at a time, also of a long document,
whose tokens are kept in a file until they are appended. (On a Ray cluster they travel in memory: about
0.45 bytes for a byte of text; and an encoding that is not GPT-2's takes a document whole.)
"""

import hashlib
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt.config import Tokenization
from compactgpt.data import TokenFile, open_tokens, token_dtype
from compactgpt.documents import Counted, RowGroup, Stored, row_groups, stream_row_group
from compactgpt.encoder import Encoder, UnencodableText, load_encoder
from compactgpt.engine import run_tasks
from compactgpt.errors import BadData
from compactgpt.ledger import COLUMNS, SPLITS, Column, Ledger, Piece, open_ledger, piece_sha256
from compactgpt.progress import Progress, silent
from compactgpt.storage import MANIFEST, atomic_folder, json_bytes, read_json, verified_manifest

__all__ = ["Task", "encode_group", "split_of", "tokenize"]

Split = Literal["train", "val"]
WORKER_BYTES = 2**26  # of text; with less of it another process costs more than it brings
FLUSH_TOKENS = 2**20  # tokens that wait to be packed
SPILL_BYTES = 2**24  # of packed tokens; what is more goes to the parent by file
STATE_VERSION = 2


@dataclass(frozen=True)
class Task:
    """One row group, and all that decides what becomes of it."""

    group: RowGroup
    tokenizer: Path
    tokenizer_sha256: str
    encoder: Literal["gigatoken", "tiktoken"]
    val_fraction: float
    spill: Path | None  # folder for long columns, where worker and parent share one


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
    state: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make the folder of token files.

    Args:
        documents: folder of document shards.
        tokenizer: folder of the encoding.
        folder: where train.tokens and val.tokens, each with its index, go; replaced as a whole.
        params: how to split, and by what means to encode.
        num_workers: processes; the result does not depend on it.
        state: folder where a killed run's pieces wait; best on the disk of `folder`.
        progress: told the bytes of text done.

    Returns:
        The report: of each split documents, tokens (end-of-text included), bytes of text and hashes.

    Raises:
        MissingInput, BadData: an input is missing or damaged, or a split got no document.
    """
    manifest = verified_manifest(documents)
    facts = _tokenizer_facts(tokenizer, params)
    own = state / _key(manifest, facts, params)
    _sweep(state, own)
    with open_ledger(own) as ledger:
        tasks = _tasks(documents, tokenizer, facts, params, own)[ledger.state.pieces :]
        _make_pieces(ledger, tasks, params, num_workers, progress, manifest["bytes"])
        about = {**facts, "val_fraction": params.val_fraction}
        with atomic_folder(folder, about, kind="tokens") as temporary:
            _publish(ledger, temporary, facts, params, manifest["documents"])
    shutil.rmtree(own, ignore_errors=True)
    return {"tokenizer": facts, **_reports(folder)}


def _tokenizer_facts(folder: Path, params: Tokenization) -> dict[str, Any]:
    """Check the encoding once, before any worker loads it."""
    sha256 = verified_manifest(folder)["tokenizer_sha256"]
    encoding = _cached_encoder(folder, sha256, params.encoder).encoding
    return {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "tokenizer_sha256": sha256,
    }


_KEY = re.compile("[0-9a-f]{16}")


def _key(manifest: Mapping[str, Any], facts: Mapping[str, Any], params: Tokenization) -> str:
    """Name the state by all that decides its bytes: pieces of other inputs are never gone on with."""
    inputs = [STATE_VERSION, manifest["files"], facts, params.val_fraction, params.encoder]
    return hashlib.sha256(json_bytes(inputs)).hexdigest()[:16]


def _sweep(state: Path, own: Path) -> None:
    """Delete the state of other inputs, and what killed workers left in our own."""
    for other in state.iterdir() if state.exists() else ():
        if other != own and _KEY.fullmatch(other.name):
            shutil.rmtree(other, ignore_errors=True)
    for left in own.glob("*.spill"):
        left.unlink()


def _tasks(
    documents: Path, tokenizer: Path, facts: Mapping[str, Any], params: Tokenization, own: Path
) -> list[Task]:
    spill = own if params.engine == "local" else None
    return [
        Task(group, tokenizer, facts["tokenizer_sha256"], params.encoder, params.val_fraction, spill)
        for group in row_groups(documents)
    ]


def _make_pieces(
    ledger: Ledger,
    tasks: Sequence[Task],
    params: Tokenization,
    num_workers: int,
    progress: Progress,
    total_bytes: int,
) -> None:
    if ledger.state.pieces or ledger.damaged:
        note = ledger.damaged or f"going on after {ledger.state.pieces:,} pieces"
        progress(ledger.state.text_bytes, total_bytes, {"note:": note})
    if params.engine == "local":
        num_workers = min(num_workers, 1 + (total_bytes - ledger.state.text_bytes) // WORKER_BYTES)
    for piece in run_tasks(params.engine, encode_group, tasks, num_workers):
        ledger.add(piece)
        progress(ledger.state.text_bytes, total_bytes, {"pieces": f"{ledger.state.pieces:,}"})


def _publish(
    ledger: Ledger, folder: Path, facts: Mapping[str, Any], params: Tokenization, documents: int
) -> None:
    settings = {key: facts[key] for key in ("vocab_size", "eot_token", "tokenizer_sha256")}
    for split in SPLITS:
        if not ledger.publish(folder, split, settings).documents:
            raise BadData(
                f"no document of {documents:,} fell into {split}: change "
                f"tokenization.val_fraction ({params.val_fraction}) in params.yaml, or add text"
            )


def encode_group(task: Task) -> Piece:
    """Encode the documents of one row group: a pure function of files on disk, for any process."""
    encoder = _cached_encoder(task.tokenizer, task.tokenizer_sha256, task.encoder)
    below = math.ceil(task.val_fraction * 2**64)
    places = {split: _spill_path(task, split) for split in SPLITS}
    splits = {split: _Split(encoder, task.group, places[split]) for split in SPLITS}
    text_bytes = 0
    for document in stream_row_group(task.group):
        split = "val" if int(document.id[:16], 16) < below else "train"
        text_bytes += splits[split].add(document)
    columns = {split: made.columns() for split, made in splits.items()}
    return Piece(columns, piece_sha256(columns), text_bytes)


def _spill_path(task: Task, split: str) -> Path | None:
    if task.spill is None:
        return None
    return task.spill / f"{task.group.path.stem}-{task.group.index}-{split}.spill"


class _Split:
    """Packs the documents of one split of one piece."""

    def __init__(self, encoder: Encoder, group: RowGroup, spill: Path | None) -> None:
        self._encoder, self._group, self._spill = encoder, group, spill
        self._vocab_size = encoder.encoding.n_vocab
        self._dtype = token_dtype(self._vocab_size)
        self._end_of_text = np.array([encoder.encoding.eot_token], np.uint32)
        self._waiting: list[npt.NDArray[np.uint32]] = []
        self._num_waiting = 0
        self._packed = bytearray()
        self._file: IO[bytes] | None = None
        self._lengths: list[int] = []
        self._byte_lengths: list[int] = []
        self._ids = bytearray()

    def add(self, document: Stored) -> int:
        """Encode a document; returns its bytes of text."""
        length, parts = 0, Counted(document.parts)
        try:
            for tokens in self._encoder.encode(parts):
                self._wait(tokens)
                length += len(tokens)
        except UnencodableText as error:
            raise BadData(
                f"{document.source} (document {document.id} in {self._group.path}): {error}"
            ) from error
        self._wait(self._end_of_text)
        self._lengths.append(length + 1)
        self._byte_lengths.append(parts.size)
        self._ids += bytes.fromhex(document.id)
        return parts.size

    def _wait(self, tokens: npt.NDArray[np.uint32]) -> None:
        self._waiting.append(tokens)
        self._num_waiting += len(tokens)
        if self._num_waiting >= FLUSH_TOKENS:
            self._pack()

    def _pack(self) -> None:
        if not self._num_waiting:
            return
        tokens = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        if int(tokens.max()) >= self._vocab_size:
            raise BadData(
                f"{self._group.path}, row group {self._group.index}: "
                f"a document has a token id not below {self._vocab_size}"
            )
        self._packed += tokens.astype(self._dtype).tobytes()
        if self._spill and len(self._packed) >= SPILL_BYTES:
            self._file = self._file or open(self._spill, "wb")  # noqa: SIM115 (closed by `columns`)
            self._file.write(self._packed)
            self._packed = bytearray()

    def columns(self) -> dict[str, Column]:
        """Finish, and give the columns of ledger.py."""
        self._pack()
        tokens: Column = bytes(self._packed)
        if self._file and self._spill:
            self._file.write(self._packed)
            self._file.close()
            tokens = self._spill
        numbers = [np.array(each, "<i8").tobytes() for each in (self._lengths, self._byte_lengths)]
        return dict(zip(COLUMNS, [tokens, *numbers, bytes(self._ids)], strict=True))


@lru_cache(maxsize=1)
def _cached_encoder(tokenizer: Path, _sha256: str, choice: Literal["gigatoken", "tiktoken"]) -> Encoder:
    """Load the encoder once a process; the hash keeps another one in the same folder apart."""
    return load_encoder(tokenizer, choice)


def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    files = read_json(folder / MANIFEST)["files"]
    splits = {split: open_tokens(folder / f"{split}.tokens") for split in SPLITS}
    return {split: _split_report(file, files[file.path.name]["sha256"]) for split, file in splits.items()}


def _split_report(file: TokenFile, sha256: str) -> dict[str, Any]:
    total_bytes = int(file.byte_lengths.sum())
    lengths = np.diff(file.offsets)
    return {
        "documents": file.header.documents,
        "tokens": file.header.tokens,
        "bytes": total_bytes,
        "bytes_per_token": total_bytes / (file.header.tokens - file.header.documents),
        "longest_document_share": float(lengths.max() / file.header.tokens),
        "sha256": sha256,
    }
