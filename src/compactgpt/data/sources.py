"""The `download` stage: a corpus -> a folder of document shards; a tokenizer -> a folder of its files.

Shards are written one by one into `<state>/download/<key>/`, each with a note of its hash, of the counts up
to its end and of the corpus's position there. A run that was stopped resumes after its last finished shard.
At the end the shards become the folder of documents.
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
    read_ids,
    shard_name,
    write_shard,
)
from compactgpt.data.hub_texts import hub_corpus
from compactgpt.data.text_files import file_corpus
from compactgpt.data.tokenizer import ENCODER_JSON, VOCAB_BPE, save_gpt2, save_named
from compactgpt.data.wheels import fetch_wheel_member

VERSION = 3  # of finished shards and their notes
Log = Callable[[str], None]


class Limits(NamedTuple):
    """How much of a corpus is taken, and the size of shards."""

    shard_bytes: int
    max_documents: int | None = None
    max_bytes: int | None = None


@dataclass
class Counts:
    """What was kept and left out up to some text of a corpus."""

    documents: list[int]  # kept, by part
    bytes: list[int]  # of kept text in UTF-8, by part
    left_out: dict[str, int]  # by reason
    position: Any = None  # of the text


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
    """Write the folders `documents` and `tokenizer`, each replaced as a whole.

    Args:
        params: section `download` of params.yaml.
        documents: folder of document shards.
        tokenizer: folder of the tokenizer's files.
        root: folder that the patterns of `files` are relative to.
        state: folder for files of wheels, and for the shards of a run that was stopped.
        num_workers: processes; the result does not depend on it.
        progress: called with the number of modules, files or rows that were read.
        log: called with a message for each shard of an earlier run.

    Returns:
        The report: the facts of both manifests, the name of the corpus, and the texts left out, by reason.

    Raises:
        BadData: an input is damaged, or no document is left.
        MissingInput: an input is missing.
        BadConfig, Unreachable: the hub does not have the data set, or does not answer.
    """
    # The tokenizer first: it is small, and without a network it fails at once.
    tokenizer_facts = download_tokenizer(params.tokenizer, tokenizer, state / "wheels")
    corpus = open_corpus(params, root, num_workers, progress)
    limits = Limits(params.shard_megabytes * MEGABYTE, params.max_documents, params.max_bytes)
    report = collect(corpus, documents, limits, state=state / "download", log=log)
    return {**report, "name": corpus_name(params), "tokenizer": tokenizer_facts}


def open_corpus(params: Download, root: Path, num_workers: int, progress: Progress) -> Corpus:
    """Return the corpus that `download.corpus` names."""
    if params.corpus == "docstrings":
        return docstring_corpus(params.docstrings, num_workers, progress)
    if params.corpus == "files":
        return file_corpus(params, root, progress)
    return hub_corpus(params, progress)


def corpus_name(params: Download) -> str:
    """Return what reports call the corpus."""
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
    """Write the folder of an encoding, GPT-2's from a wheel; return the facts of its manifest."""
    if params.encoding != "gpt2":
        return save_named(folder, params.encoding)
    vocab_bpe, encoder_json = (f"{params.wheel_folder}/{name}" for name in (VOCAB_BPE, ENCODER_JSON))
    return save_gpt2(
        folder,
        fetch_wheel_member(params.wheel, vocab_bpe, params.vocab_bpe_sha256, cache).read_bytes(),
        fetch_wheel_member(params.wheel, encoder_json, params.encoder_json_sha256, cache).read_bytes(),
    )


def collect(corpus: Corpus, folder: Path, limits: Limits, *, state: Path, log: Log) -> dict[str, Any]:
    """Write a corpus as a folder of document shards; `state` keeps them for the next run if this one stops.

    Returns:
        The facts of the folder's manifest, and `left_out`: how many texts were left out, by reason.

    Raises:
        BadData: an input is damaged, or no document is left.
    """
    shards_folder = state / _state_key(corpus, limits)
    facts: dict[str, Any] = {"corpus": corpus.name}
    with atomic_folder(folder, facts, kind="documents") as temporary:
        counts, facts["shards"] = _write_shards(corpus, shards_folder, limits, log)
        facts["documents"], facts["bytes"] = sum(counts.documents), sum(counts.bytes)
        if not facts["documents"]:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.left_out.items())
            raise BadData(f"no document is left of the corpus {corpus.name} ({reasons}): add text")
        paths = [shards_folder / name for name in facts["shards"]]
        facts["sources"] = _part_facts(corpus, counts, paths)
        for path in paths:
            try:
                os.link(path, temporary / path.name)
            except OSError:  # this file system has no hard links
                shutil.copyfile(path, temporary / path.name)
    shutil.rmtree(state, ignore_errors=True)  # with unfinished shards of other corpora
    return {**facts, "left_out": counts.left_out}


def _state_key(corpus: Corpus, limits: Limits) -> str:
    """Name the folder of finished shards: another corpus, or other limits, never take them over."""
    import pyarrow as pa

    lengths = [corpus.lengths.start, corpus.lengths.stop]
    # Another version of pyarrow may write other bytes.
    inputs = [VERSION, pa.__version__, corpus.name, corpus.identity, corpus.parts, lengths, limits]
    return hashlib.sha256(json_bytes(inputs)).hexdigest()[:16]


def _write_shards(
    corpus: Corpus, folder: Path, limits: Limits, log: Log
) -> tuple[Counts, dict[str, dict[str, int]]]:
    """Take over the finished shards and write the others; return documents and bytes of each by its name."""
    zeros = [0] * len(corpus.parts)
    counts = Counts(zeros, zeros.copy(), {"empty": 0, "short": 0, "long": 0, "duplicate": 0})
    seen: set[bytes] = set()  # ids; 100 bytes each, 0.8 GB for OpenWebText
    shards: dict[str, dict[str, int]] = {}
    path = folder / shard_name(0)
    while (finished := _read_finished(path, log)) is not None:
        counts, shards[path.name] = Counts(**finished["counts"]), finished["shard"]
        seen.update(read_ids(path))  # a text after the position may repeat one before it
        path = folder / shard_name(len(shards))
    documents = _select(corpus.read(counts.position), corpus.lengths, limits, counts, seen)
    totals = sum(counts.documents), sum(counts.bytes)
    while write_shard(path, documents, limits.shard_bytes):
        before, totals = totals, (sum(counts.documents), sum(counts.bytes))
        shard = {"documents": totals[0] - before[0], "bytes": totals[1] - before[1]}
        note = {"sha256": sha256_file(path), "shard": shard, "counts": asdict(counts)}
        write_json(path.with_suffix(".json"), note)  # last: a shard without a note is not finished
        shards[path.name] = shard
        path = folder / shard_name(len(shards))
    return counts, shards


def _read_finished(path: Path, log: Log) -> dict[str, Any] | None:
    """Read the note of a finished shard; None if the shard is missing or damaged."""
    note_path = path.with_suffix(".json")
    if not path.exists() or not note_path.exists():
        return None
    try:
        note: dict[str, Any] = read_json(note_path)
        verify_file(path, note["sha256"])
        number = note["shard"]["documents"]
    except (UserError, KeyError, TypeError):
        log(f"{path} of an earlier run is damaged: it and the shards after it are written again")
        return None  # the corpus is read again from the position before this shard
    log(f"{path.name} was finished by an earlier run ({number:,} documents) and is kept")
    return note


def _select(
    texts: Iterator[Text], lengths: range, limits: Limits, counts: Counts, seen: set[bytes]
) -> Iterator[Document]:
    """Yield the texts that are kept, and count them and the others."""
    max_documents = limits.max_documents or sys.maxsize
    max_bytes = limits.max_bytes or sys.maxsize
    # The limit is tested first, so that no text after the last document is read.
    while sum(counts.documents) < max_documents and (text := next(texts, None)) is not None:
        counts.position = text.position  # of a text that is left out, too
        if not text.text.strip():
            counts.left_out["empty"] += 1
            continue
        if len(text.text) not in lengths:
            counts.left_out["short" if len(text.text) < lengths.start else "long"] += 1
            continue
        document = new_document(text.text, text.source)
        size = len(text.text.encode("utf-8"))
        if sum(counts.bytes) + size > max_bytes:
            return  # even if a shorter text follows: a subset is the beginning of the corpus
        document_id = bytes.fromhex(document.id)  # half the size of its digits
        if document_id in seen:
            counts.left_out["duplicate"] += 1
            continue
        seen.add(document_id)
        counts.documents[text.part] += 1
        counts.bytes[text.part] += size
        yield document


def _part_facts(corpus: Corpus, counts: Counts, shards: Iterable[Path]) -> list[dict[str, Any]]:
    """Return what was kept of each part; `sha256` is of the documents' 16-byte ids, in order."""
    # The parts are read one after another, so each has a run of the ids of all shards.
    ids = chain.from_iterable(map(read_ids, shards))
    facts = []
    for part, documents, size in zip(corpus.parts, counts.documents, counts.bytes, strict=True):
        digest = hashlib.sha256(b"".join(islice(ids, documents))).hexdigest()
        facts.append({**part._asdict(), "documents": documents, "bytes": size, "sha256": digest})
    return facts
