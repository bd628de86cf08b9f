"""The `download` stage: write a corpus as document shards, and a tokenizer as a folder of files.

The stage writes the shards one by one into `<state>/download/<key>/`. Each shard has a JSON note: the shard's
hash, and the counts and the position in the corpus at its end. A stopped run resumes after its last finished
shard. When all shards are finished, they become the folder of documents.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from glob import has_magic
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadConfig, BadData, UserError
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
    read_ids,
    shard_name,
    write_shard,
)
from compactgpt.data.hub_texts import hub_corpus
from compactgpt.data.text_files import file_corpus, unread_files
from compactgpt.data.token_files import ENCODER_JSON, VOCAB_BPE
from compactgpt.data.tokenizer import save_gpt2, save_named
from compactgpt.data.wheels import fetch_wheel_member

VERSION = 3  # format version of finished shards and their notes
Log = Callable[[str], None]


class Limits(NamedTuple):
    """The size of shards, and how much of a corpus to keep."""

    shard_bytes: int
    max_documents: int | None = None
    max_bytes: int | None = None


@dataclass
class Counts:
    """How many texts were kept and left out, up to a position in the corpus."""

    documents: list[int]  # number of kept documents of each part
    bytes: list[int]  # UTF-8 bytes of kept text of each part
    left_out: dict[str, int]  # number of texts by reason
    position: Any = None  # position of the last counted text


def download(
    params: Download,
    documents: Path,
    tokenizer: Path,
    *,
    root: Path,
    state: Path,
    num_workers: int,
    progress: Progress,
    log: Log,
) -> dict[str, Any]:
    """Write the folders `documents` and `tokenizer`, and return the report.

    Args:
        params: the section `download` of params.yaml.
        documents: folder of document shards; replaced if it exists.
        tokenizer: folder of the tokenizer's files; replaced if it exists.
        root: folder to which `download.files.patterns` are relative.
        state: folder for files from wheels, and for the shards of a stopped run.
        num_workers: number of processes; the result does not depend on it.
        progress: called with the number of modules, files or rows read.
        log: called with a message for each shard of an earlier run.

    Returns:
        The report: facts of both manifests, the corpus's name, and the number of left-out texts by reason.

    Raises:
        BadData: an input is damaged, or every text of the corpus was left out.
        MissingInput: an input is missing.
        BadConfig: the hub does not have the data set, params.yaml has no commit, or `max_bytes` is too small.
        Unreachable: the hub or the package index does not answer.
    """
    # Tokenizer first: it is small, so a missing network is reported at once.
    tokenizer_facts = download_tokenizer(params.tokenizer, tokenizer, state / "wheels")
    corpus = open_corpus(params, root, num_workers, progress, log)
    limits = Limits(params.shard_megabytes * MEGABYTE, params.max_documents, params.max_bytes)
    report = collect(corpus, documents, limits, state=state / "download", log=log)
    if reasons := _left_out(report["left_out"]):
        log(f"{report['documents']:,} documents; left out: {reasons}")
    return {**report, "name": corpus_name(params), "tokenizer": tokenizer_facts}


def open_corpus(params: Download, root: Path, num_workers: int, progress: Progress, log: Log) -> Corpus:
    """Return the corpus that `download.corpus` names, and log which files in corpus/ are not part of it."""
    if params.corpus != "files":
        copy = params.hub.sets[params.hub.name].file if params.corpus == "hub" else None
        reason = f"download.corpus is {params.corpus}, and files reads them"
        for message in unread_files(root, {copy or ""}, reason):
            log(message)
    if params.corpus == "docstrings":
        return docstring_corpus(params.docstrings, num_workers, progress)
    if params.corpus == "files":
        return file_corpus(params, root, progress, log)
    return hub_corpus(params, progress)


def corpus_name(params: Download) -> str:
    """Return the name of the corpus in reports."""
    if params.corpus == "docstrings":
        return "docstrings"
    if params.corpus == "hub":
        return params.hub.name
    if params.files.name is not None:
        return params.files.name
    first, *others = params.files.patterns
    if others or has_magic(first):
        return "your text"
    return PurePath(first).name.split(".")[0]


def download_tokenizer(params: Tokenizer, folder: Path, cache: Path) -> dict[str, Any]:
    """Write the tokenizer folder, and return its facts. The files of GPT-2 come from a wheel."""
    if params.encoding != "gpt2":
        return save_named(folder, params.encoding)
    vocab_bpe, encoder_json = (f"{params.wheel_folder}/{name}" for name in (VOCAB_BPE, ENCODER_JSON))
    return save_gpt2(
        folder,
        fetch_wheel_member(params.wheel, vocab_bpe, params.vocab_bpe_sha256, cache).read_bytes(),
        fetch_wheel_member(params.wheel, encoder_json, params.encoder_json_sha256, cache).read_bytes(),
    )


def collect(corpus: Corpus, folder: Path, limits: Limits, *, state: Path, log: Log) -> dict[str, Any]:
    """Write a corpus as a folder of document shards.

    If the run stops, finished shards stay in the folder `state`, and the next run resumes after them.

    Returns:
        The facts of the folder's manifest; among them `left_out`, the number of left-out texts by reason.

    Raises:
        BadData: an input is damaged, or every text of the corpus was left out.
        BadConfig: `limits.max_bytes` is less than the first document has.
    """
    shards_folder = state / _state_key(corpus, limits)
    facts: dict[str, Any] = {"corpus": corpus.name}
    with atomic_folder(folder, facts, kind="documents") as temporary:
        counts, facts["shards"] = _write_shards(corpus, shards_folder, limits, log)
        facts["documents"], facts["bytes"] = sum(counts.documents), sum(counts.bytes)
        facts["left_out"] = counts.left_out
        if not facts["documents"]:
            reasons = _left_out(counts.left_out) or "none, the corpus is empty"
            raise BadData(f"no document is left of the corpus {corpus.name} (left out: {reasons}): add text")
        paths = [shards_folder / name for name in facts["shards"]]
        facts["sources"] = _part_facts(corpus, counts, paths)
        for path in paths:
            try:
                os.link(path, temporary / path.name)
            except OSError:  # this file system has no hard links
                shutil.copyfile(path, temporary / path.name)
    shutil.rmtree(state, ignore_errors=True)  # including the shards of other corpora
    return facts


def _left_out(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in numbers.items() if number)


def _state_key(corpus: Corpus, limits: Limits) -> str:
    """Return the name of the folder of finished shards: a hash of the corpus and the limits."""
    import pyarrow as pa

    lengths = [corpus.lengths.start, corpus.lengths.stop]
    # Include pyarrow's version: another version may write other bytes.
    inputs = [VERSION, pa.__version__, corpus.name, corpus.identity, corpus.parts, lengths, limits]
    return hashlib.sha256(json_bytes(inputs)).hexdigest()[:16]


def _write_shards(
    corpus: Corpus, folder: Path, limits: Limits, log: Log
) -> tuple[Counts, dict[str, dict[str, int]]]:
    """Keep finished shards, write the others; return the counts, and documents and bytes per shard."""
    zeros = [0] * len(corpus.parts)
    counts = Counts(zeros, zeros.copy(), {"empty": 0, "short": 0, "long": 0, "duplicate": 0})
    seen: set[bytes] = set()  # document ids; 100 bytes of memory each, 0.8 GB for OpenWebText
    shards: dict[str, dict[str, int]] = {}
    path = folder / shard_name(0)
    while (finished := _read_finished(path, log)) is not None:
        counts, shards[path.name] = Counts(**finished["counts"]), finished["shard"]
        seen.update(read_ids(path))  # a later text may repeat a document of this shard
        path = folder / shard_name(len(shards))
    documents = _select(corpus.read(counts.position), corpus.lengths, limits, counts, seen)
    totals = sum(counts.documents), sum(counts.bytes)
    while write_shard(path, documents, limits.shard_bytes):
        before, totals = totals, (sum(counts.documents), sum(counts.bytes))
        shard = {"documents": totals[0] - before[0], "bytes": totals[1] - before[1]}
        note = {"sha256": sha256_file(path), "shard": shard, "counts": asdict(counts)}
        write_json(path.with_suffix(".json"), note)  # written last: a shard without a note is unfinished
        shards[path.name] = shard
        path = folder / shard_name(len(shards))
    return counts, shards


def _read_finished(path: Path, log: Log) -> dict[str, Any] | None:
    """Return the note of a finished shard, or None if the shard is missing or damaged."""
    note_path = path.with_suffix(".json")
    if not path.exists() or not note_path.exists():
        return None
    try:
        note: dict[str, Any] = read_json(note_path)
        verify_file(path, note["sha256"])
        number = note["shard"]["documents"]
    except (UserError, KeyError, TypeError):
        log(f"{path} of an earlier run is damaged: it and the shards after it are written again")
        return None  # the caller reads the corpus from the end of the previous shard
    log(f"{path.name} was finished by an earlier run ({number:,} documents) and is kept")
    return note


def _select(
    texts: Iterator[Text], lengths: range, limits: Limits, counts: Counts, seen: set[bytes]
) -> Iterator[Document]:
    """Yield the documents to keep, and count the kept and the left-out texts in `counts`."""
    max_documents = limits.max_documents or sys.maxsize
    max_bytes = limits.max_bytes or sys.maxsize
    # Test the limit before `next`, so that no text after the last document is read.
    while sum(counts.documents) < max_documents and (text := next(texts, None)) is not None:
        counts.position = text.position  # also for a text that is left out
        if not text.text.strip():
            counts.left_out["empty"] += 1
            continue
        if len(text.text) not in lengths:
            counts.left_out["short" if len(text.text) < lengths.start else "long"] += 1
            continue
        document = new_document(text.text, text.source)
        size = len(text.text.encode("utf-8"))
        if sum(counts.bytes) + size > max_bytes:
            if not any(counts.documents):
                raise BadConfig(
                    f"download.max_bytes is {max_bytes:,}, and the first document ({document.source}) has "
                    f"{size:,} bytes: raise max_bytes"
                )
            return  # do not look for shorter texts: a subset is the beginning of the corpus
        document_id = bytes.fromhex(document.id)  # half the size of the hex digits
        if document_id in seen:
            counts.left_out["duplicate"] += 1
            continue
        seen.add(document_id)
        counts.documents[text.part] += 1
        counts.bytes[text.part] += size
        yield document


def _part_facts(corpus: Corpus, counts: Counts, shards: Iterable[Path]) -> list[dict[str, Any]]:
    """Return name, documents, bytes and hash of each part; the hash is of the 16-byte ids, in order."""
    # Parts are stored one after another, so the ids of a part are consecutive.
    ids = chain.from_iterable(map(read_ids, shards))
    facts = []
    for part, documents, size in zip(corpus.parts, counts.documents, counts.bytes, strict=True):
        digest = hashlib.sha256(b"".join(islice(ids, documents))).hexdigest()
        facts.append({**part._asdict(), "documents": documents, "bytes": size, "sha256": digest})
    return facts
