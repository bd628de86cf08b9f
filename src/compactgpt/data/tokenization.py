"""Documents -> the token files of data.py: train and val, split by document hash.

The split looks at nothing but a document's id, so that growth of the corpus never moves a document. Text
is encoded as ordinary text: a special token that is spelled in it becomes ordinary tokens.

Workers encode one row group of documents at a time, a pure function of files on disk. Their results are
appended, in the order of the documents, to the chunk of their shard: a folder `<state>/<key>/<shard>` with
these files for each split. A finished chunk has a manifest, so that a run that was killed skips it.

    <split>.tokens      token ids, each document closed by end-of-text
    <split>.lengths     int64, tokens of each document, end-of-text included
    <split>.bytes       int64, length of its text in UTF-8
    <split>.ids         16 bytes, its id

At the end the chunks are joined. So the token files are the same whatever the number of workers, the engine,
and how often the run was killed. Memory holds one row group a worker, and its tokens.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, UserError
from compactgpt.common.storage import (
    MANIFEST,
    atomic_file,
    atomic_folder,
    json_bytes,
    read_json,
    tensors_header,
    verified_manifest,
)
from compactgpt.config import Tokenization
from compactgpt.data.documents import RowGroup, read_texts, row_groups
from compactgpt.data.encoder import Encoder, UnencodableText, load_encoder
from compactgpt.data.engines import run_tasks
from compactgpt.data.token_files import (
    VERSION,
    Header,
    TokenFile,
    encode_header,
    index_path,
    open_tokens,
    token_dtype,
)

__all__ = ["Task", "encode_group", "split_of", "tokenize"]

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
COLUMNS = ("tokens", "lengths", "bytes", "ids")
WORKER_BYTES = 2**26  # of text; with less of it another process costs more than it brings
STATE_VERSION = 3
_COPY_BYTES = 2**22  # a multiple of the 8 bytes of a number
Columns = Mapping[str, Mapping[str, bytes]]  # by split, by name


@dataclass(frozen=True)
class Task:
    """One row group, and all that decides what becomes of it."""

    group: RowGroup
    tokenizer: Path
    tokenizer_sha256: str
    encoder: Literal["gigatoken", "tiktoken"]
    val_fraction: float


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
        state: folder that keeps the finished chunks of a killed run.
        progress: told the bytes of text done.

    Returns:
        The report: of each split documents, tokens (end-of-text included), bytes of text and hashes.

    Raises:
        MissingInput, BadData: an input is missing or damaged, or a split got no document.
    """
    manifest = verified_manifest(documents)
    facts = _tokenizer_facts(tokenizer, params)
    own = state / _key(manifest, facts, params)
    for other in state.iterdir() if state.exists() else ():
        if other != own and _KEY.fullmatch(other.name):  # of other inputs
            shutil.rmtree(other, ignore_errors=True)
    groups = row_groups(documents)
    tasks = [
        Task(group, tokenizer, facts["tokenizer_sha256"], params.encoder, params.val_fraction)
        for group in groups
    ]
    _make_chunks(own, tasks, params, num_workers, progress, manifest["bytes"])
    chunks = [own / name for name in dict.fromkeys(group.path.stem for group in groups)]
    about = {**facts, "val_fraction": params.val_fraction}
    with atomic_folder(folder, about, kind="tokens") as temporary:
        for split in SPLITS:
            if not _write_split(temporary, split, chunks, facts):
                raise BadData(
                    f"no document of {manifest['documents']:,} fell into {split}: change "
                    f"tokenization.val_fraction ({params.val_fraction}) in params.yaml, or add text"
                )
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
    """Name the state by all that decides its bytes: chunks of other inputs are never used."""
    inputs = [STATE_VERSION, manifest["files"], facts, params.val_fraction, params.encoder]
    return hashlib.sha256(json_bytes(inputs)).hexdigest()[:16]


# --- chunks


def _make_chunks(
    folder: Path,
    tasks: Sequence[Task],
    params: Tokenization,
    num_workers: int,
    progress: Progress,
    total_bytes: int,
) -> None:
    """Make the chunk of each shard that has none yet."""
    finished = {task.group.path.stem: _finished_bytes(folder / task.group.path.stem) for task in tasks}
    done = sum(filter(None, finished.values()))
    todo = [task for task in tasks if finished[task.group.path.stem] is None]
    if done:
        number = sum(size is not None for size in finished.values())
        progress(done, total_bytes, {"note:": f"{number:,} of {len(finished):,} shards are finished already"})
    for name in [name for name, size in finished.items() if size is None and (folder / name).exists()]:
        progress(done, total_bytes, {"note:": f"{folder / name} was altered: made again"})
    if params.engine == "local":
        num_workers = min(num_workers, 1 + (total_bytes - done) // WORKER_BYTES)
    # One stream of results for all shards, so that no worker waits where a shard ends.
    results = zip(todo, run_tasks(params.engine, encode_group, todo, num_workers), strict=True)
    for name, pieces in groupby(results, lambda result: result[0].group.path.stem):
        chunk_facts = {"text_bytes": 0}
        with (
            atomic_folder(folder / name, chunk_facts, kind="token chunk", private=True) as temporary,
            ExitStack() as stack,
        ):
            files: dict[tuple[str, str], IO[bytes]] = {
                (split, column): stack.enter_context(open(temporary / f"{split}.{column}", "wb"))
                for split in SPLITS
                for column in COLUMNS
            }
            for _, columns in pieces:
                size = _append(files, columns)
                chunk_facts["text_bytes"] += size
                done += size
                progress(done, total_bytes)
            stack.close()  # before the files are hashed


def _append(files: Mapping[tuple[str, str], IO[bytes]], columns: Columns) -> int:
    """Append what one row group became; returns its bytes of text."""
    for (split, column), file in files.items():
        file.write(columns[split][column])
    return sum(int(np.frombuffer(columns[split]["bytes"], "<i8").sum()) for split in SPLITS)


def _finished_bytes(chunk: Path) -> int | None:
    """The bytes of text in a chunk of an earlier run; None where there is none, or where it is damaged."""
    try:
        return int(verified_manifest(chunk)["text_bytes"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def encode_group(task: Task) -> dict[str, dict[str, bytes]]:
    """Encode the documents of one row group: a pure function of files on disk, for any process.

    Returns:
        The columns of the module's docstring, by split.
    """
    encoder = _cached_encoder(task.tokenizer, task.tokenizer_sha256, task.encoder)
    below = math.ceil(task.val_fraction * 2**64)
    splits: dict[str, _Split] = {split: _Split(encoder, task.group) for split in SPLITS}
    for document_id, source, text in read_texts(task.group):
        split = "val" if int(document_id[:16], 16) < below else "train"
        splits[split].add(document_id, source, text)
    return {split: made.columns() for split, made in splits.items()}


class _Split:
    """Packs the documents of one split of one row group."""

    def __init__(self, encoder: Encoder, group: RowGroup) -> None:
        self._encoder, self._group = encoder, group
        self._end_of_text = np.array([encoder.encoding.eot_token], np.uint32)
        self._tokens: list[npt.NDArray[np.uint32]] = []
        self._lengths: list[int] = []
        self._byte_lengths: list[int] = []
        self._ids = bytearray()

    def add(self, document_id: str, source: str, text: memoryview) -> None:
        """Encode a document."""
        length = 1  # end-of-text
        try:
            for tokens in self._encoder.encode(text):
                self._tokens.append(tokens)
                length += len(tokens)
        except UnencodableText as error:
            raise BadData(f"{source} (document {document_id} in {self._group.path}): {error}") from error
        self._tokens.append(self._end_of_text)
        self._lengths.append(length)
        self._byte_lengths.append(len(text))
        self._ids += bytes.fromhex(document_id)

    def columns(self) -> dict[str, bytes]:
        """Return the columns, ids in the width that the vocabulary needs."""
        vocab_size = self._encoder.encoding.n_vocab
        tokens = np.concatenate(self._tokens) if self._tokens else np.empty(0, np.uint32)
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise BadData(
                f"{self._group.path}, row group {self._group.index}: "
                f"a document has a token id not below {vocab_size}"
            )
        packed = tokens.astype(token_dtype(vocab_size)).tobytes()
        numbers = [np.array(each, "<i8").tobytes() for each in (self._lengths, self._byte_lengths)]
        return dict(zip(COLUMNS, [packed, *numbers, bytes(self._ids)], strict=True))


@lru_cache(maxsize=1)
def _cached_encoder(tokenizer: Path, _sha256: str, choice: Literal["gigatoken", "tiktoken"]) -> Encoder:
    """Load the encoder once a process; the hash keeps another one in the same folder apart."""
    return load_encoder(tokenizer, choice)


# --- token files


def _write_split(folder: Path, split: Split, chunks: Sequence[Path], facts: Mapping[str, Any]) -> int:
    """Join the chunks into `folder/<split>.tokens` and its index; returns the number of documents."""
    parts = {column: [chunk / f"{split}.{column}" for chunk in chunks] for column in COLUMNS}
    sizes = {column: sum(path.stat().st_size for path in paths) for column, paths in parts.items()}
    dtype = token_dtype(facts["vocab_size"])
    settings = {key: facts[key] for key in ("vocab_size", "eot_token", "tokenizer_sha256")}
    header = Header(VERSION, dtype.name, sizes["tokens"] // dtype.itemsize, sizes["bytes"] // 8, **settings)
    target = folder / f"{split}.tokens"
    with atomic_file(target) as file:
        file.write(encode_header(header))
        file.writelines(_blocks(parts["tokens"]))
    _write_index(index_path(target), header.documents, parts)
    return header.documents


def _write_index(path: Path, documents: int, parts: Mapping[str, Sequence[Path]]) -> None:
    """Write a document index (data.py) from its columns on disk, as safetensors' own writer would."""
    header = tensors_header([
        ("bytes", "I64", [documents], 8 * documents),
        ("offsets", "I64", [documents + 1], 8 * (documents + 1)),
        ("ids", "U8", [documents, 16], 16 * documents),
    ])  # fmt: skip
    with atomic_file(path) as file:
        file.write(header)
        file.writelines(_blocks(parts["bytes"]))
        end = np.zeros(1, "<i8")
        file.write(end.tobytes())
        for block in _blocks(parts["lengths"]):
            ends = end + np.cumsum(np.frombuffer(block, "<i8"))
            file.write(ends.astype("<i8").tobytes())
            end = ends[-1:]
        file.writelines(_blocks(parts["ids"]))


def _blocks(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the content of files, one after another, in bounded memory."""
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_COPY_BYTES):
                yield block


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
