"""Texts from anywhere -> a folder of document shards, made shard by shard so that a killed run goes on.

A `Reader` yields texts and can say where it stands. Texts worth keeping are cut into shards of a bounded
size. A finished shard lies in `<state>/<key>/` with a note of its hash, of what it counts, and of where its
reader stood; the next run takes it over and starts the reader there. A shard that does not have its hash
any more is named, and made again. The folder is assembled from the shards at the end.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from compactgpt.common.errors import BadData, UserError
from compactgpt.common.storage import (
    atomic_folder,
    json_bytes,
    read_json,
    sha256_file,
    verify_file,
    write_json,
)
from compactgpt.data.documents import (
    Document,
    IdSet,
    new_document,
    read_ids,
    shard_name,
    write_shard,
)

VERSION = 2  # of finished shards and the notes beside them
MEGABYTE = 1_000_000
Say = Callable[[str], None]


def quiet(_message: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Origin:
    """A part of a corpus, as reports name it."""

    name: str
    version: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Piece:
    """One text on its way into the corpus."""

    text: str
    where: str  # the source of the document
    part: int  # index in the reader's parts


class Reader(Protocol):
    """A corpus that can be read on from any place."""

    @property
    def name(self) -> str:
        """The corpus, as params.yaml calls it."""

    @property
    def identity(self) -> Any:
        """JSON that is another one where the texts, or what is taken of them, may be others."""

    @property
    def parts(self) -> Sequence[Origin]:
        """The parts, in the order in which they are read, each read once and whole."""

    @property
    def lengths(self) -> range:
        """Lengths of wanted texts, in characters."""

    def read(self, place: Any) -> Iterator[Piece]:
        """Yield the texts behind a place, which `place` gave, or all if it is None."""

    def place(self) -> Any:
        """Say, in JSON, where the reader stands: right behind the piece that it yielded last."""


@dataclass(frozen=True)
class Limits:
    """How much is taken, and in shards of which size."""

    shard_bytes: int
    max_documents: int | None = None
    max_bytes: int | None = None


@dataclass
class Part:
    """What was kept of one part of the corpus."""

    origin: Origin
    documents: int = 0
    bytes: int = 0
    _hasher: Any = field(default_factory=hashlib.sha256)

    def count(self, document_id: str, size: int) -> None:
        """Add one kept document of `size` bytes."""
        self.documents += 1
        self.bytes += size
        self._hasher.update(bytes.fromhex(document_id))

    def facts(self) -> dict[str, Any]:
        """Say what was kept; `sha256` is of the documents' 16-byte ids, in order."""
        return {
            "name": self.origin.name,
            "version": self.origin.version,
            "licence": self.origin.licence,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self._hasher.hexdigest(),
        }


class Tally:
    """What was kept and left out so far: all that deciding about the next text needs."""

    def __init__(self, parts: Sequence[Origin]) -> None:
        self.parts = [Part(origin) for origin in parts]
        self.left_out = {"empty": 0, "short": 0, "long": 0, "duplicate": 0}
        self.seen = IdSet()
        self.documents = self.bytes = 0

    def keep(self, part: int, document_id: str, size: int) -> None:
        """Count one kept document."""
        self.parts[part].count(document_id, size)
        self.documents += 1
        self.bytes += size

    def counts(self) -> list[list[int]]:
        """Documents and bytes of each part."""
        return [[part.documents, part.bytes] for part in self.parts]

    def replay(self, ids: list[str], note: dict[str, Any]) -> None:
        """Count a finished shard as if it had just been made."""
        stream = iter(ids)
        for part, (documents, size) in zip(self.parts, note["parts"], strict=True):
            for number in range(documents):
                document_id = next(stream)
                self.seen.add(document_id)
                # The sizes of one part's documents are known together only.
                part.count(document_id, 0 if number else size)
        self.documents += note["documents"]
        self.bytes += note["bytes"]
        self.left_out = dict(note["left_out"])


def collect(reader: Reader, folder: Path, limits: Limits, *, state: Path, say: Say = quiet) -> dict[str, Any]:
    """Make a folder of document shards.

    Args:
        reader: where the texts come from.
        folder: replaced as a whole.
        limits: how much is taken, and in shards of which size.
        state: keeps the shards of a run that was stopped, under a key of its own; emptied at the end.
        say: told of kept shards, and of damaged ones.

    Returns:
        The facts of the folder's manifest, and `left_out`, how many texts were, by reason.

    Raises:
        BadData: nothing is left, or an input is damaged.
    """
    kept = state / corpus_key(reader, limits)
    tally = Tally(reader.parts)
    facts: dict[str, Any] = {"corpus": reader.name}
    with atomic_folder(folder, facts, kind="documents") as temporary:
        facts["shards"] = _make_shards(reader, kept, limits, tally, say)
        facts["sources"] = [part.facts() for part in tally.parts]
        facts["documents"], facts["bytes"] = tally.documents, tally.bytes
        if not tally.documents:
            counts = ", ".join(f"{number:,} {reason}" for reason, number in tally.left_out.items())
            raise BadData(f"no document is left of the corpus {reader.name} ({counts}): add text")
        for name in facts["shards"]:
            _link(kept / name, temporary / name)
    shutil.rmtree(state, ignore_errors=True)
    return {**facts, "left_out": tally.left_out}


def corpus_key(reader: Reader, limits: Limits) -> str:
    """Name the state of one corpus: another corpus, or other limits, never meet its shards."""
    import pyarrow as pa

    whole = [VERSION, pa.__version__, reader.name, reader.identity, vars(limits)]
    whole += [[vars(origin) for origin in reader.parts], [reader.lengths.start, reader.lengths.stop]]
    return hashlib.sha256(json_bytes(whole)).hexdigest()[:16]


def _make_shards(
    reader: Reader, kept: Path, limits: Limits, tally: Tally, say: Say
) -> dict[str, dict[str, int]]:
    """Take over or make each shard; returns documents and bytes of text by name."""
    shards: dict[str, dict[str, int]] = {}
    stream: Iterator[Document] | None = None
    place = None
    for number in count():
        path = kept / shard_name(number)
        note = _finished(path, say)
        if note is not None:
            stream = None
            tally.replay(read_ids(path), note)
        else:
            if stream is None:
                stream = _wanted(reader.read(place), reader.lengths, limits, tally)
            note = _make_shard(path, stream, reader, limits, tally)
        if note is None:
            break
        place = note["place"]
        shards[path.name] = {"documents": note["documents"], "bytes": note["bytes"]}
    return shards


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _finished(path: Path, say: Say) -> dict[str, Any] | None:
    """The note of a finished shard; None where there is none, or where it is damaged."""
    if not path.exists() or not _note(path).exists():
        return None
    try:
        note: dict[str, Any] = read_json(_note(path))
        verify_file(path, note["sha256"])
    except (UserError, KeyError, TypeError):
        say(f"{path} was kept by an earlier run and is damaged: it is fetched again")
        return None
    say(f"{path.name} was finished by an earlier run ({note['documents']:,} documents): it is not made again")
    return note


def _make_shard(
    path: Path, stream: Iterator[Document], reader: Reader, limits: Limits, tally: Tally
) -> dict[str, Any] | None:
    before, documents, size = tally.counts(), tally.documents, tally.bytes
    if not write_shard(path, stream, limits.shard_bytes):
        return None
    note = {
        "sha256": sha256_file(path),
        "documents": tally.documents - documents,
        "bytes": tally.bytes - size,
        "parts": [
            [new[0] - old[0], new[1] - old[1]] for new, old in zip(tally.counts(), before, strict=True)
        ],
        "left_out": tally.left_out,
        "place": reader.place(),
    }
    write_json(_note(path), note)
    return note


def _wanted(pieces: Iterator[Piece], lengths: range, limits: Limits, tally: Tally) -> Iterator[Document]:
    """Pass on the texts worth keeping, the first of exact duplicates, and count the others."""
    max_documents, max_bytes = limits.max_documents, limits.max_bytes
    while max_documents is None or tally.documents < max_documents:
        piece = next(pieces, None)
        if piece is None:
            return
        if not piece.text.strip():
            tally.left_out["empty"] += 1
            continue
        if len(piece.text) not in lengths:
            tally.left_out["short" if len(piece.text) < lengths.start else "long"] += 1
            continue
        document = new_document(piece.text, piece.where)
        size = len(piece.text.encode("utf-8"))
        if max_bytes is not None and tally.bytes + size > max_bytes:
            return
        if not tally.seen.add(document.id):
            tally.left_out["duplicate"] += 1
            continue
        tally.keep(piece.part, document.id, size)
        yield document


def _link(path: Path, target: Path) -> None:
    """Give a finished shard its second name; a copy where the file system has no hard links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
