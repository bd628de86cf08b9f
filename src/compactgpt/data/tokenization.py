"""Encode documents and write the token files of train and val.

Each worker encodes one document shard into a chunk: a folder in `state` with a token file for each split.
After a killed run, the next run skips the shards that have a chunk. At the end, the chunks are joined. The
token files do not depend on the number of workers, on the engine, or on how often the run was killed.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData, Busy, Unreachable, UserError
from compactgpt.common.storage import atomic_folder, json_bytes, read_manifest, verified_manifest
from compactgpt.common.workers import ordered_map
from compactgpt.config import Tokenization
from compactgpt.data.documents import Document, RowGroup, read_row_group, row_groups
from compactgpt.data.token_files import TokenFile, open_tokens, pack_documents, write_tokens
from compactgpt.data.tokenizer import load_encoder

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
STATE_VERSION = 5  # of the chunks
RETRIES = 5  # how often Ray runs a task again after its worker died
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SplitRule:
    """The rule that chooses the documents of val: by hash, or all documents from a position on."""

    val_fraction: float
    # Shard, row group and row of val's first document; None: documents are chosen by hash.
    val_start: tuple[str, int, int] | None = None

    def in_val(self, group: RowGroup, documents: Sequence[Document]) -> list[bool]:
        """Return for each document of a row group whether the document is in val.

        By hash, it is in val if the first 64 bits of its id, divided by 2^64, are less than `val_fraction`.
        So a document keeps its split when the corpus grows.
        """
        if self.val_start is None:
            return [int(each.id[:16], 16) < self.val_fraction * 2**64 for each in documents]
        return [(group.path.name, group.index, row) >= self.val_start for row in range(len(documents))]


def split_rule(groups: Sequence[RowGroup], split: str, val_fraction: float, size: int) -> SplitRule:
    """Return the rule that splits the corpus in `groups`, which has `size` bytes of text.

    `val_fraction` is val's share of the documents with split `hash`, of the bytes of text with `tail`. With
    `tail` val is the end of the corpus, as in nanoGPT: the pieces of one file are two contiguous blocks.
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
    """Write train.tokens and val.tokens, each with its index, into `folder`, and return the report.

    The chunks of a killed run are in `state`. `progress` is called with the bytes of text encoded.
    Raises MissingInput or BadData if an input is missing or damaged, BadData if a split has no document.
    """
    corpus, saved = verified_manifest(documents), verified_manifest(tokenizer)
    facts = {key: saved[key] for key in ("encoding", "vocab_size", "eot_token", "tokenizer_sha256")}
    vocabulary = {key: facts[key] for key in ("vocab_size", "eot_token", "tokenizer_sha256")}
    groups = row_groups(documents)
    shards = [list(of_shard) for _, of_shard in groupby(groups, lambda group: group.path)]
    # The name is a hash of everything that determines the chunks, so that no chunk is used for other inputs.
    rule_facts = [params.val_fraction, params.split]
    inputs = json_bytes([STATE_VERSION, corpus["files"], facts, rule_facts, params.encoder])
    chunks = state / hashlib.sha256(inputs).hexdigest()[:16]
    for other in state.iterdir() if state.exists() else ():
        if other != chunks:
            shutil.rmtree(other, ignore_errors=True)
    encode = partial(
        encode_shard,
        chunks=chunks,
        tokenizer=tokenizer,
        encoder_name=params.encoder,
        vocabulary=vocabulary,
        rule=split_rule(groups, params.split, params.val_fraction, corpus["bytes"]),
    )
    encoded_bytes = 0
    run_tasks = ordered_map if params.engine == "local" else run_on_ray
    for size in run_tasks(encode, shards, max(1, min(num_workers, len(shards)))):
        encoded_bytes += size
        progress(encoded_bytes, corpus["bytes"])
    facts_of_files = {**facts, "val_fraction": params.val_fraction}
    if params.split != "hash":  # without `split`, a manifest means `hash`, as in earlier versions
        facts_of_files["split"] = params.split
    with atomic_folder(folder, facts_of_files, kind="tokens") as temporary:
        for split in SPLITS:
            paths = [chunks / shard[0].path.stem / f"{split}.tokens" for shard in shards]
            parts = [open_tokens(path, verify=False) for path in paths]  # `encode_shard` has verified them
            if not any(part.header.documents for part in parts):
                raise BadData(_empty_split(split, corpus["documents"], params))
            write_tokens(temporary / f"{split}.tokens", parts)
    shutil.rmtree(chunks, ignore_errors=True)
    report: dict[str, Any] = {"tokenizer": facts, "split": params.split}
    return report | {split: _split_report(folder, split) for split in SPLITS}


def encode_shard(
    groups: Sequence[RowGroup],
    *,
    chunks: Path,
    tokenizer: Path,
    encoder_name: Literal["gigatoken", "tiktoken"],
    vocabulary: dict[str, Any],
    rule: SplitRule,
) -> int:
    """Write the chunk of one shard, given as its row groups, and return the shard's bytes of text."""
    chunk = chunks / groups[0].path.stem
    try:
        return int(verified_manifest(chunk)["text_bytes"])  # the shard was finished by an earlier run
    except (UserError, KeyError):
        pass  # the chunk is missing or damaged: write it
    encoder = load_encoder(tokenizer, encoder_name)
    parts: dict[Split, list[TokenFile]] = {split: [] for split in SPLITS}
    text_bytes = 0
    for group in groups:
        rows: dict[Split, list[tuple[bytes, int, Any]]] = {split: [] for split in SPLITS}
        documents = read_row_group(group)
        for document, in_val in zip(documents, rule.in_val(group, documents), strict=True):
            byte_length = len(document.text.encode())
            text_bytes += byte_length
            row = (bytes.fromhex(document.id), byte_length, encoder.encode(document.text))
            rows["val" if in_val else "train"].append(row)
        for split in SPLITS:  # packed, a token of GPT-2 takes 2 bytes of memory
            parts[split].append(pack_documents(group.path, rows[split], **vocabulary))
    with atomic_folder(chunk, {"text_bytes": text_bytes}, kind="token chunk", private=True) as temporary:
        for split in SPLITS:
            write_tokens(temporary / f"{split}.tokens", parts[split])
    return text_bytes


def _empty_split(split: Split, documents: int, params: Tokenization) -> str:
    found = f"no document of {documents:,} is in {split}"
    if documents == 1:
        return f"{found}, since train and val need one each: set download.files.split, or add text"
    tail = ", or set tokenization.split to tail," if params.split == "hash" else ""
    change = f"change tokenization.val_fraction ({params.val_fraction}){tail} in params.yaml"
    return f"{found}: {change}, or add text"


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


# --- Ray


def run_on_ray(function: Callable[[T], R], tasks: Sequence[T], num_workers: int) -> Iterator[R]:
    """Yield `function(task)` for each task, in order, from the cluster at RAY_ADDRESS or one started here.

    Every node needs this package installed and the project's folder at the same path. Raises the function's
    UserError, BadConfig if Ray is not installed, Unreachable if no cluster answers, Busy if workers die.
    """
    ray = _connect(num_workers)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        for reference in [remote.remote(function, task) for task in tasks]:
            yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # the function's own error, without Ray's traceback
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise Busy(
            f"the Ray worker of a task died {RETRIES + 1} times, most often because memory ran out: "
            "give the workers more memory, and run the same command again"
        ) from error
    finally:
        ray.shutdown()


def _call(function: Callable[[T], R], task: T) -> R:
    return function(task)  # Ray accepts a function, but not a functools.partial


def _connect(num_workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise BadConfig(
            "tokenization.engine is ray, which is not installed: "
            "pip install 'compactgpt[ray]', or set tokenization.engine to local in params.yaml"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address or "local"}
    if not address:
        options["num_cpus"] = num_workers
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}): "
            "check RAY_ADDRESS, or set tokenization.engine to local in params.yaml"
        ) from error
    return ray
