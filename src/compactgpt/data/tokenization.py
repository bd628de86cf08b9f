"""Encode documents and write the token files of train and val.

`tokenization.split` chooses the documents of val. With `hash` a document's split depends only on its id, so
it keeps its split when the corpus grows. With `tail` val is the end of the corpus, as in nanoGPT: the pieces
of one file are in train and val as two contiguous blocks.

Each worker encodes one row group at a time. The results are collected in document order into one chunk per
document shard. A chunk is a folder `<state>/<key>/<shard>` with a token file for each split. A finished chunk
has a manifest. After a killed run, the next run skips the shards that have a finished chunk. At the end, the
chunks are joined. The token files do not depend on the number of workers, on the engine, or on how often the
run was killed. Memory holds the tokens of one shard, and one or two encoded row groups per worker.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, UserError
from compactgpt.common.storage import atomic_folder, json_bytes, read_manifest, verified_manifest
from compactgpt.config import Tokenization
from compactgpt.data.documents import Document, RowGroup, read_row_group, row_groups
from compactgpt.data.engines import run_tasks
from compactgpt.data.token_files import EncodedDocuments, Tokens, open_tokens, pack_documents, write_tokens
from compactgpt.data.tokenizer import TiktokenEncoder, load_encoder

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
EncoderName = Literal["gigatoken", "tiktoken"]
WORKER_BYTES = 2**26  # of text per worker; with less text, another process costs more time than it saves
STATE_VERSION = 4


@dataclass(frozen=True)
class SplitRule:
    """The rule that chooses the documents of val: by hash, or all documents from a position on."""

    val_fraction: float
    # Shard, row group and row of val's first document; None: documents are chosen by hash.
    val_start: tuple[str, int, int] | None = None

    def in_val(self, group: RowGroup, documents: Sequence[Document]) -> list[bool]:
        """Return for each document of a row group whether the document is in val.

        By hash, it is in val if the first 64 bits of its id, divided by 2^64, are less than `val_fraction`.
        """
        if self.val_start is None:
            return [int(each.id[:16], 16) < self.val_fraction * 2**64 for each in documents]
        return [(group.path.name, group.index, row) >= self.val_start for row in range(len(documents))]


def split_rule(groups: Sequence[RowGroup], split: str, val_fraction: float, size: int) -> SplitRule:
    """Return the rule that splits a corpus.

    Args:
        groups: the row groups of the corpus, in document order.
        split: the value of `tokenization.split`, `hash` or `tail`.
        val_fraction: share of val: of the documents with `hash`, of the bytes of text with `tail`.
        size: bytes of text in the corpus.
    """
    if split == "hash":
        return SplitRule(val_fraction)
    wanted = val_fraction * size
    for group in reversed(groups):  # only the end of the corpus is read
        for row, document in reversed([*enumerate(read_row_group(group))]):
            wanted -= len(document.text.encode())
            if wanted <= 0:
                return SplitRule(val_fraction, (group.path.name, group.index, row))
    return SplitRule(val_fraction, ("", 0, 0))  # the corpus has no document


@dataclass(frozen=True)
class Task:
    """One row group, and everything that determines its tokens."""

    group: RowGroup
    tokenizer: Path
    tokenizer_sha256: str
    encoder: EncoderName
    rule: SplitRule

    @property
    def shard(self) -> str:
        """The name of the shard that contains the row group."""
        return self.group.path.stem


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
    """Write the token files of train and val, and return the report.

    Args:
        documents: folder of document shards.
        tokenizer: folder of the tokenizer.
        folder: folder for train.tokens and val.tokens, each with its index; replaced if it exists.
        params: the section `tokenization` of params.yaml.
        num_workers: number of processes; the result does not depend on it.
        state: folder for the finished chunks of a killed run.
        progress: called with the number of bytes of text encoded.

    Raises:
        MissingInput: an input is missing.
        BadData: an input is damaged, or a split has no document.
    """
    corpus = verified_manifest(documents)
    saved = verified_manifest(tokenizer)  # once, before the workers load the tokenizer
    facts = {key: saved[key] for key in ("encoding", "vocab_size", "eot_token", "tokenizer_sha256")}
    settings = {key: facts[key] for key in ("vocab_size", "eot_token", "tokenizer_sha256")}
    groups = row_groups(documents)
    rule = split_rule(groups, params.split, params.val_fraction, corpus["bytes"])
    tasks = [Task(group, tokenizer, facts["tokenizer_sha256"], params.encoder, rule) for group in groups]
    chunk_folder = _chunk_folder(state, corpus, facts, params)
    _write_chunks(chunk_folder, tasks, settings, params.engine, num_workers, corpus["bytes"], progress)
    chunks = [chunk_folder / shard for shard in dict.fromkeys(task.shard for task in tasks)]
    facts_of_files = {**facts, "val_fraction": params.val_fraction}
    if params.split != "hash":  # without `split`, a manifest means `hash`, as in earlier versions
        facts_of_files["split"] = params.split
    with atomic_folder(folder, facts_of_files, kind="tokens") as temporary:
        for split in SPLITS:
            if not _join_chunks(chunks, temporary / f"{split}.tokens", settings):
                raise BadData(_empty_split(split, corpus["documents"], params))
    shutil.rmtree(chunk_folder, ignore_errors=True)
    report: dict[str, Any] = {"tokenizer": facts, "split": params.split}
    return report | {split: _split_report(folder, split) for split in SPLITS}


def _empty_split(split: Split, documents: int, params: Tokenization) -> str:
    found = f"no document of {documents:,} is in {split}"
    if documents == 1:
        return f"{found}, since train and val need one each: set download.files.split, or add text"
    change = f"tokenization.val_fraction ({params.val_fraction})"
    if params.split == "hash":
        change += ", or set tokenization.split to tail,"
    return f"{found}: change {change} in params.yaml, or add text"


def _chunk_folder(
    state: Path, corpus: Mapping[str, Any], facts: Mapping[str, Any], params: Tokenization
) -> Path:
    """Return the folder of the chunks of these inputs, and remove the chunks of other inputs."""
    # The name is a hash of everything that determines the chunks, so that no chunk is used for other inputs.
    rule = [params.val_fraction, params.split]
    inputs = json_bytes([STATE_VERSION, corpus["files"], facts, rule, params.encoder])
    folder = state / hashlib.sha256(inputs).hexdigest()[:16]
    for other in state.iterdir() if state.exists() else ():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _write_chunks(
    folder: Path,
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    engine: Literal["local", "ray"],
    num_workers: int,
    total_bytes: int,
    progress: Progress,
) -> None:
    """Write the chunk of each shard that has no finished chunk."""
    sizes = {task.shard: _finished_bytes(folder / task.shard) for task in tasks}
    finished = [size for size in sizes.values() if size is not None]
    done_bytes = sum(finished)
    if finished:
        note = f"{len(finished):,} of {len(sizes):,} shards are finished already"
        progress(done_bytes, total_bytes, {"note:": note})
    # A damaged chunk counts as missing: it is written again.
    todo = [task for task in tasks if sizes[task.shard] is None]
    if engine == "local":
        num_workers = min(num_workers, 1 + (total_bytes - done_bytes) // WORKER_BYTES)
    # A chunk stays in memory until the last row group of its shard is encoded. Then it is written.
    # All shards share one stream of results, so that no worker waits at the end of a shard.
    results = zip(todo, run_tasks(engine, encode_group, todo, num_workers), strict=True)
    for shard, shard_results in groupby(results, lambda result: result[0].shard):
        parts: dict[Split, list[EncodedDocuments]] = {split: [] for split in SPLITS}
        shard_bytes = 0
        for _, encoded in shard_results:
            for split in SPLITS:
                parts[split].append(encoded[split])
                shard_bytes += int(encoded[split].byte_lengths.sum())
            progress(done_bytes + shard_bytes, total_bytes)
        done_bytes += shard_bytes
        chunk_facts = {"text_bytes": shard_bytes}
        with atomic_folder(folder / shard, chunk_facts, kind="token chunk", private=True) as temporary:
            for split in SPLITS:
                write_tokens(temporary / f"{split}.tokens", parts[split], **settings)


def _finished_bytes(chunk: Path) -> int | None:
    """Return the bytes of text in a finished chunk, or None if the chunk is missing or damaged."""
    try:
        return int(verified_manifest(chunk)["text_bytes"])
    except (UserError, KeyError):
        return None


def _join_chunks(chunks: Sequence[Path], path: Path, settings: Mapping[str, Any]) -> int:
    """Join one split's token files from all chunks into `path`; return the number of documents."""
    # Each chunk was verified by `_finished_bytes` or was just written, so do not verify it again.
    files = (open_tokens(chunk / path.name, verify=False) for chunk in chunks)
    parts = (file.all_documents() for file in files)
    return write_tokens(path, parts, **settings).documents


def encode_group(task: Task) -> dict[Split, EncodedDocuments]:
    """Return one row group's encoded documents: a pure function of files, so any process can run it."""
    encoder = _cached_encoder(task.tokenizer, task.tokenizer_sha256, task.encoder)
    documents: dict[Split, list[tuple[bytes, int, Tokens]]] = {split: [] for split in SPLITS}
    group = read_row_group(task.group)
    for document, in_val in zip(group, task.rule.in_val(task.group, group), strict=True):
        split: Split = "val" if in_val else "train"
        tokens, byte_length = encoder.encode(document.text), len(document.text.encode())
        documents[split].append((bytes.fromhex(document.id), byte_length, tokens))
    # Pack the tokens (2 bytes each for GPT-2) before the result is sent to another process.
    vocab_size, eot_token = encoder.encoding.n_vocab, encoder.encoding.eot_token
    return {
        split: pack_documents(documents[split], vocab_size=vocab_size, eot_token=eot_token)
        for split in SPLITS
    }


@lru_cache(maxsize=1)
def _cached_encoder(tokenizer: Path, _sha256: str, choice: EncoderName) -> TiktokenEncoder:
    """Load the encoder once per process; the hash distinguishes tokenizers in the same folder."""
    return load_encoder(tokenizer, choice)


def _split_report(folder: Path, split: Split) -> dict[str, Any]:
    """Return a split's numbers of documents, tokens (end-of-text included) and bytes, and its file's hash."""
    file = open_tokens(folder / f"{split}.tokens", verify=False)
    total_bytes = int(file.byte_lengths.sum())
    longest = int(np.diff(file.offsets).max())
    return {
        "documents": file.header.documents,
        "tokens": file.header.tokens,
        "bytes": total_bytes,
        # Do not count end-of-text tokens: they encode no text.
        "bytes_per_token": total_bytes / (file.header.tokens - file.header.documents),
        "longest_document_share": longest / file.header.tokens,
        "sha256": read_manifest(folder)["files"][f"{split}.tokens"]["sha256"],
    }
