"""Encode the documents into a token file for train and one for val.

Each document shard becomes a chunk. A resumed tokenization keeps the finished chunks.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import compress, groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, Unreachable, UserError
from compactgpt.common.storage import atomic_folder, json_bytes, read_manifest, verified_manifest
from compactgpt.common.workers import ordered_map
from compactgpt.config import Tokenization
from compactgpt.data.documents import Document, RowGroup, read_row_group, row_groups
from compactgpt.data.token_files import TokenFile, open_tokens, pack_documents, write_tokens
from compactgpt.data.tokenizer import load_encoder

SPLITS = ("train", "val")
STATE_VERSION = 5  # version of the chunk format; chunks of another version are not used
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SplitRule:
    """The rule that chooses the val documents: by hash, or by position in the corpus."""

    val_fraction: float  # wanted share of the corpus in val, from 0 to 1
    # Position of the first val document: shard name, row group, row. None: documents are chosen by hash.
    val_start: tuple[str, int, int] | None = None

    def in_val(self, group: RowGroup, documents: Sequence[Document]) -> list[bool]:
        """Return, for each document of a row group, whether the document is in val."""
        if self.val_start is None:
            # An id is a hash, as good as random. When the corpus grows, a document keeps its id and split.
            return [int(each.id[:16], 16) < self.val_fraction * 2**64 for each in documents]
        return [(group.path.name, group.number, row) >= self.val_start for row in range(len(documents))]


def split_rule(groups: Sequence[RowGroup], split: str, val_fraction: float, size: int) -> SplitRule:
    """Return the rule that divides a corpus of `size` bytes into train and val.

    `split` is `hash` (val documents are chosen by their ids) or `tail` (val is the end of the corpus).
    """
    if split == "hash":
        return SplitRule(val_fraction)
    # As in nanoGPT, val is the end of the corpus.
    missing = val_fraction * size  # bytes of text that val still needs
    for group in reversed(groups):  # from the end, so that only the val documents are read
        for row, document in reversed([*enumerate(read_row_group(group))]):
            missing -= len(document.text.encode())
            if missing <= 0:
                return SplitRule(val_fraction, (group.path.name, group.number, row))
    return SplitRule(val_fraction, ("", 0, 0))  # reached only if the corpus has no document


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
    """Write the token files of both splits into `folder`, and return the report.

    `state` is the folder of finished chunks. Raises BadData if a split has no document.
    """
    corpus, saved = verified_manifest(documents), verified_manifest(tokenizer)
    facts = {key: saved[key] for key in ("encoding", "vocab_size", "eot_token", "tokenizer_sha256")}
    groups = row_groups(documents)
    shards = [list(of_shard) for _, of_shard in groupby(groups, lambda group: group.path)]
    # The name of the chunks' folder is a hash of all inputs: chunks of other inputs are never used.
    settings = [params.val_fraction, params.split, params.encoder]
    inputs = json_bytes([STATE_VERSION, corpus["files"], facts, settings])
    chunks = state / hashlib.sha256(inputs).hexdigest()[:16]
    for other in state.glob("*"):
        if other != chunks:
            shutil.rmtree(other, ignore_errors=True)
    encode = partial(
        encode_shard,
        chunks=chunks,
        tokenizer=tokenizer,
        library=params.encoder,
        vocabulary={key: facts[key] for key in ("vocab_size", "eot_token", "tokenizer_sha256")},
        rule=split_rule(groups, params.split, params.val_fraction, corpus["bytes"]),
    )
    encoded_bytes = 0
    run_tasks = ordered_map if params.engine == "local" else run_on_ray
    for size in run_tasks(encode, shards, max(1, min(num_workers, len(shards)))):
        encoded_bytes += size
        progress(encoded_bytes, corpus["bytes"])
    how: dict[str, Any] = {"val_fraction": params.val_fraction}
    if params.split != "hash":  # a manifest without the key `split` means `hash`
        how["split"] = params.split
    with atomic_folder(folder, {**facts, **how}, kind="tokens") as temporary:
        for split in SPLITS:
            paths = [chunks / shard[0].path.stem / f"{split}.tokens" for shard in shards]
            # Do not verify: `encode_shard` has just written the chunks, or has verified them.
            parts = [open_tokens(path, verify=False) for path in paths]
            if not any(part.header.documents for part in parts):
                raise BadData(
                    f"{split} has none of the {corpus['documents']:,} documents: change "
                    f"tokenization.val_fraction ({params.val_fraction}) or tokenization.split "
                    f"({params.split}), or set download.files.split, which cuts a file into documents"
                )
            write_tokens(temporary / f"{split}.tokens", parts)
    shutil.rmtree(chunks, ignore_errors=True)
    return {"tokenizer": facts, "split": params.split, **describe_splits(folder)}


def encode_shard(
    groups: Sequence[RowGroup],
    *,
    chunks: Path,
    tokenizer: Path,
    library: Literal["gigatoken", "tiktoken"],
    vocabulary: dict[str, Any],
    rule: SplitRule,
) -> int:
    """Write the token files of one shard, and return the number of bytes of the shard's text.

    `groups` are the row groups of the shard. The token files are written to a subfolder of `chunks`. This
    subfolder is called a chunk, and has the name of the shard.
    """
    chunk = chunks / groups[0].path.stem
    with suppress(UserError, KeyError):  # raised for a missing or damaged chunk, which is written below
        return int(verified_manifest(chunk)["text_bytes"])  # the chunk was finished before an interruption
    encode = load_encoder(tokenizer, library)
    parts: dict[str, list[TokenFile]] = {split: [] for split in SPLITS}
    text_bytes = 0
    for group in groups:
        documents = read_row_group(group)
        rows = [(bytes.fromhex(each.id), len(each.text.encode()), encode(each.text)) for each in documents]
        text_bytes += sum(byte_length for _, byte_length, _ in rows)
        in_val = rule.in_val(group, documents)
        # Packing saves memory: a packed token takes 2 bytes instead of 4.
        for split, chosen in (("train", np.logical_not(in_val)), ("val", in_val)):
            parts[split].append(pack_documents(group.path, compress(rows, chosen), **vocabulary))
    with atomic_folder(chunk, {"text_bytes": text_bytes}, kind="token chunk", force=True) as temporary:
        for split in SPLITS:
            write_tokens(temporary / f"{split}.tokens", parts[split])
    return text_bytes


def describe_splits(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size of each split, and the SHA-256 of its token file.

    The number of tokens includes the end-of-text tokens.
    """
    files = read_manifest(folder)["files"]
    splits = {split: open_tokens(folder / f"{split}.tokens", verify=False) for split in SPLITS}
    return {
        split: {
            "documents": file.header.documents,
            "tokens": file.header.tokens,
            "bytes": int(file.byte_lengths.sum()),
            "sha256": files[file.path.name]["sha256"],
        }
        for split, file in splits.items()
    }


def run_on_ray(function: Callable[[T], R], tasks: Sequence[T], num_workers: int) -> Iterator[R]:
    """Yield `function(task)` for each task, in order, from the workers of a Ray cluster.

    Without RAY_ADDRESS, Ray starts a cluster on this machine.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS")
    num_cpus = None if address else num_workers  # None: a running cluster knows its number of CPUs
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address or "local", num_cpus=num_cpus, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}): set "
            "RAY_ADDRESS to the address of a running cluster, or set tokenization.engine to local"
        ) from error
    try:
        # A lambda, since `function` is a functools.partial, which ray.remote does not accept.
        remote = ray.remote(num_cpus=1)(lambda task: function(task))  # noqa: PLW0108
        for reference in [remote.remote(task) for task in tasks]:
            yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the error that `function` raised
    finally:
        ray.shutdown()
