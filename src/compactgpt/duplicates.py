"""Documents that say the same: equal and nearly equal ones, and text of val that train has seen.

All three look at words: runs of letters, digits and underscores, lower-cased, as in appendix C of the GPT-3
paper (Brown et al. 2020), which ignores punctuation, white space and case. A word is its 64-bit hash, and a
run of words a polynomial of them.

    same words      two documents with the same hash of all their words
    near duplicate  MinHash (Broder 1997) of runs of 5 words, found by locality-sensitive hashing in bands;
                    similarity is the share of equal signature places, an estimate of Jaccard's
    overlap         the share of a val document's runs of 13 words that some train document has; 13 is GPT-3's
                    length, and lm-evaluation-harness' (docs/decontamination.md)

Memory: 12 bytes a document beside one band of the signatures; these lie on disk, in 4 bytes a place. The
runs of val are in memory: val is a small share, and a document with more than RUNS_A_DOCUMENT of them is
known by the ones with the lowest hashes, a sample that is the same everywhere. Long documents are read in
parts. V documents of val, G runs in them, N documents in all.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compactgpt.config import Inspection
from compactgpt.documents import Counted, RowGroup, Stored, stream_row_group
from compactgpt.parallel import ordered_map
from compactgpt.progress import Progress, silent

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
_KNOWN_WORDS = 2**19  # that a process remembers the hashes of
_NEIGHBOURS = 8  # of a bucket, in the order of documents, that a document is compared with
_PAIRS_AT_ONCE = 2**16
_RUNS_AT_ONCE = 2**20
RUNS_A_DOCUMENT = 2**18
_POSTINGS = 10  # train documents that are remembered for one run of val


@dataclass(frozen=True)
class Task:
    """One row group, and what to look for in it."""

    group: RowGroup
    params: Inspection
    val: Path  # folder of the arrays that `save_val_runs` wrote


@dataclass(frozen=True)
class Digest:
    """What is kept of the n documents of one row group."""

    ids: npt.NDArray[Any]  # (n,) S16
    byte_lengths: Numbers  # (n,)
    in_val: Flags  # (n,)
    words: Hashes  # (n,) of all words
    signatures: npt.NDArray[np.uint32]  # (n, permutations)
    runs: Numbers  # (hits,) indices of val's runs that a train document has, ...
    owners: Numbers  # (hits,) ... and which one of the n


@dataclass(frozen=True)
class Overlap:
    """What train has seen of val."""

    documents: Numbers  # (V,) numbers of val's documents in the corpus
    runs: Numbers  # (V,) distinct runs of each
    seen: Numbers  # (V,) of these, in train
    twins: Numbers  # (V,) number of the train document that shares most of them, -1 for none


@dataclass(frozen=True)
class Twins:
    """The nearest near duplicate of every document."""

    similarity: npt.NDArray[np.float32]  # (N,) 0 for none
    twin: Numbers  # (N,) -1 for none
    similarity_across: npt.NDArray[np.float32]  # (N,) the same, of those in the other split
    twin_across: Numbers  # (N,)


def id_array(ids: Iterable[bytes]) -> npt.NDArray[Any]:
    """16-byte ids as an array that sorts and compares. (n,)"""
    return np.array(list(ids), "S16")


def word_hashes(text: str) -> Hashes:
    """Hash each word of a text. (words,)"""
    known = _known_words()
    if len(known) > _KNOWN_WORDS:
        known.clear()
    return np.array([known[word] for word in _WORD.findall(text.lower())], np.uint64)


class _Known(dict[str, int]):
    """The hashes of words; a new word is hashed when it is asked for."""

    def __missing__(self, word: str) -> int:
        # A lone surrogate can't come here: documents.py refuses it.
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


@lru_cache(maxsize=1)
def _known_words() -> _Known:
    return _Known()


def run_hashes(words: Hashes, length: int) -> Hashes:
    """Hash each run of `length` words. (max(0, words - length + 1),)"""
    count = max(0, len(words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(length):
        hashes = hashes * _FACTOR + words[place : place + count]
    return hashes


def word_parts(parts: Iterable[memoryview], overlap: int) -> Iterator[tuple[Hashes, int]]:
    """Hash the words of a text that comes in parts; words that a part's end cuts are put together again.

    Yields:
        Hashes of words, up to `overlap` of them those of words before, and how many these are.
    """
    before = np.empty(0, np.uint64)
    for text in _cut_between_words(parts):
        words = np.concatenate([before, word_hashes(text)])
        yield words, len(before)
        before = words[max(0, len(words) - overlap) :]


def _cut_between_words(parts: Iterable[memoryview]) -> Iterator[str]:
    text = ""
    for part in parts:
        if text:
            place = max(text.rfind(" "), text.rfind("\n"))
            end = place if place > 0 else len(text)
            yield text[:end]
            text = text[end:]
        text += str(part, "utf-8")
    yield text


def new_runs(words: Hashes, old: int, length: int) -> Hashes:
    """Hash each run of `length` words that does not lie within the first `old` words."""
    return run_hashes(words[max(0, old - length + 1) :], length)


def _distinct_runs(parts: Iterable[memoryview], length: int) -> Hashes:
    """The lowest RUNS_A_DOCUMENT distinct hashes of runs of a document, sorted: all of nearly every one."""
    runs = np.empty(0, np.uint64)
    for words, old in word_parts(parts, length - 1):
        runs = np.unique(np.concatenate([runs, new_runs(words, old, length)]))[:RUNS_A_DOCUMENT]
    return runs


def save_val_runs(folder: Path, groups: Iterable[RowGroup], val_ids: npt.NDArray[Any], length: int) -> None:
    """Find val's documents, and write their distinct runs: arrays `ids`, `runs` and the pairs between them.

    Writes:
        ids (V,) S16 sorted; documents (V,) their numbers in the corpus, in its order; runs (G,) sorted;
        pair_runs and pair_documents (pairs,): val document k, in the order of the corpus, has run g.
    """
    wanted = np.sort(val_ids)
    numbers: list[int] = []
    hashes: list[Hashes] = []
    number = 0
    for group in groups:
        for document in stream_row_group(group):
            if _contains(wanted, id_array([bytes.fromhex(document.id)]))[0]:
                numbers.append(number)
                hashes.append(_distinct_runs(document.parts, length))
            number += 1
    every = np.concatenate([*hashes, np.empty(0, np.uint64)])
    runs, pair_runs = np.unique(every, return_inverse=True)
    np.save(folder / "ids.npy", wanted)
    np.save(folder / "documents.npy", np.array(numbers, np.int64))
    np.save(folder / "runs.npy", runs)
    np.save(folder / "pair_runs.npy", pair_runs.astype(np.int64))
    np.save(folder / "pair_documents.npy", np.repeat(np.arange(len(hashes)), [len(h) for h in hashes]))


@lru_cache(maxsize=1)
def _val_arrays(folder: Path) -> tuple[npt.NDArray[Any], Hashes]:
    """What a worker needs of val, read once a process."""
    return np.load(folder / "ids.npy"), np.load(folder / "runs.npy")


def _contains(ordered: npt.NDArray[Any], values: npt.NDArray[Any]) -> Flags:
    """Tell of each value whether it is in a sorted array. (values,)"""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: Flags = ordered[places] == values
    return found


def digest_group(task: Task) -> Digest:
    """Read the documents of one row group: a pure function of files on disk, for any process."""
    digesting = _Digesting(task.params, *_val_arrays(task.val))
    for document in stream_row_group(task.group):
        digesting.add(document)
    return digesting.finish()


class _Digesting:
    """Collects a digest, document by document."""

    def __init__(self, params: Inspection, val_ids: npt.NDArray[Any], val_runs: Hashes) -> None:
        self._params, self._val_ids, self._val_runs = params, val_ids, val_runs
        self._ids: list[bytes] = []
        self._sizes: list[int] = []
        self._in_val: list[bool] = []
        self._wholes: list[int] = []
        self._runs: list[Numbers] = []
        self._signatures: list[npt.NDArray[np.uint32]] = []
        self._waiting: list[tuple[int, Hashes]] = []  # (document, shingles)
        self._num_waiting = 0

    def add(self, document: Stored) -> None:
        """Read one document. One without words is like none but itself."""
        number, document_id = len(self._ids), bytes.fromhex(document.id)
        in_val = bool(_contains(self._val_ids, id_array([document_id]))[0])
        shingle, run = self._params.shingle_words, self._params.overlap_words
        whole, parts = hashlib.blake2b(digest_size=8), Counted(document.parts)
        seen, shingles, num_words = [np.empty(0, np.int64)], 0, 0
        self._signatures.append(np.full(self._params.permutations, 2**32 - 1, np.uint32))
        for words, old in word_parts(parts, max(shingle, run) - 1):
            whole.update(words[old:].tobytes())
            num_words += len(words) - old
            shingles += self._sign(number, new_runs(words, old, shingle))
            if not in_val:
                seen.append(self._find(new_runs(words, old, run)))
        if not num_words:
            whole.update(document_id)
        self._wholes.append(int.from_bytes(whole.digest(), "little"))
        if not shingles:
            self._sign(number, np.array([self._wholes[-1]], np.uint64))
        self._runs.append(np.unique(np.concatenate(seen)))
        self._ids.append(document_id)
        self._sizes.append(parts.size)
        self._in_val.append(in_val)

    def _find(self, runs: Hashes) -> Numbers:
        """Indices of the runs of val that are among these."""
        if not len(self._val_runs):
            return np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(self._val_runs, runs), len(self._val_runs) - 1)
        found: Numbers = np.unique(places[self._val_runs[places] == runs])
        return found

    def _sign(self, number: int, shingles: Hashes) -> int:
        """Take shingles of a document for its signature; returns how many."""
        if len(shingles):
            self._waiting.append((number, shingles))
            self._num_waiting += len(shingles)
        if self._num_waiting >= _RUNS_AT_ONCE:
            self._flush()
        return len(shingles)

    def _flush(self) -> None:
        """MinHash what waits: the signature of a whole is the least of those of its parts, place by place."""
        import rensa

        if not self._waiting:
            return
        ends = np.cumsum([0, *(len(shingles) for _, shingles in self._waiting)])
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate([shingles for _, shingles in self._waiting]),
            ends.astype(np.uint64),
            self._params.permutations,
            self._params.seed,
        )
        for (number, _), row in zip(self._waiting, np.array(matrix.to_rows(), np.uint32), strict=True):
            np.minimum(self._signatures[number], row, out=self._signatures[number])
        self._waiting, self._num_waiting = [], 0

    def finish(self) -> Digest:
        """Give what was collected."""
        self._flush()
        return Digest(
            id_array(self._ids),
            np.array(self._sizes, np.int64),
            np.array(self._in_val, np.bool_),
            np.array(self._wholes, np.uint64),
            np.array(self._signatures, np.uint32).reshape(-1, self._params.permutations),
            np.concatenate([np.empty(0, np.int64), *self._runs]),
            np.repeat(np.arange(len(self._runs)), [len(each) for each in self._runs]),
        )


class Scan:
    """One pass over a corpus: collects what the three questions need, and answers them.

    Args:
        params: what to look for.
        scratch: an empty folder; the signatures and val's runs lie there.
    """

    def __init__(self, params: Inspection, scratch: Path) -> None:
        self._params, self._scratch = params, scratch
        self._words: list[Hashes] = []
        self._in_val: list[Flags] = []
        self._postings: list[Numbers] = []  # (2, pairs) run of val, number of the train document
        self.documents = 0

    def read(
        self,
        groups: list[RowGroup],
        val_ids: npt.NDArray[Any],
        total: int,
        num_workers: int,
        progress: Progress = silent,
    ) -> Iterator[Digest]:
        """Digest each row group, and pass the digests on for other checks."""
        save_val_runs(self._scratch, groups, val_ids, self._params.overlap_words)
        self._met = np.zeros(len(np.load(self._scratch / "runs.npy", mmap_mode="r")), np.int32)
        tasks = (Task(group, self._params, self._scratch) for group in groups)
        with open(self._scratch / "signatures", "wb") as file:
            for digest in ordered_map(digest_group, tasks, num_workers):
                file.write(digest.signatures.tobytes())
                self._collect(digest)
                progress(self.documents, total)
                yield digest
        self.words, self.in_val = np.concatenate(self._words), np.concatenate(self._in_val)

    def _collect(self, digest: Digest) -> None:
        self._words.append(digest.words)
        self._in_val.append(digest.in_val)
        new = self._met[digest.runs] < _POSTINGS
        self._postings.append(np.stack([digest.runs[new], digest.owners[new] + self.documents]))
        np.add.at(self._met, digest.runs, 1)
        self.documents += len(digest.ids)

    def overlap(self) -> Overlap:
        """Tell how much of each val document some train document has, and which one has most of it."""
        documents, pair_runs, pair_documents = (
            np.load(self._scratch / f"{name}.npy") for name in ("documents", "pair_runs", "pair_documents")
        )
        size = len(documents)
        seen = np.bincount(pair_documents, weights=self._met[pair_runs] > 0, minlength=size)
        twins = np.full(size, -1, np.int64)
        runs, owners = np.concatenate([*self._postings, np.empty((2, 0), np.int64)], axis=1)
        order = np.argsort(runs, kind="stable")
        runs, owners = runs[order], owners[order]
        starts = np.searchsorted(pair_documents, np.arange(size + 1))
        for number in range(size):
            own = np.unique(pair_runs[starts[number] : starts[number + 1]])
            low, high = np.searchsorted(runs, own), np.searchsorted(runs, own, side="right")
            if (high - low).sum():
                found = np.concatenate([owners[a:b] for a, b in zip(low, high, strict=True)])
                names, counts = np.unique(found, return_counts=True)
                twins[number] = names[counts.argmax()]
        return Overlap(documents, np.bincount(pair_documents, minlength=size), seen.astype(np.int64), twins)

    def same_words(self) -> Numbers:
        """For each document, the first other one with the very same words, in the other split if it can be.

        Returns:
            Its number, -1 for none. (N,)
        """
        order = np.argsort(self.words, kind="stable")
        words, twins = self.words[order], np.full(self.documents, -1, np.int64)
        edges = np.flatnonzero(np.r_[True, words[1:] != words[:-1], True])
        for place in np.flatnonzero(np.diff(edges) > 1).tolist():
            members = order[edges[place] : edges[place + 1]]
            held_out = self.in_val[members]
            for split in (False, True):
                own, other = members[held_out == split], members[held_out != split]
                if len(other):
                    twins[own] = other[0]
                elif len(own) > 1:
                    twins[own], twins[own[0]] = own[0], own[1]
        return twins

    def near_duplicates(self) -> Twins:
        """Find the nearest near duplicate of each document, band by band."""
        rows = np.memmap(
            self._scratch / "signatures", np.uint32, "r", shape=(self.documents, self._params.permutations)
        )
        twins = Twins(
            np.zeros(self.documents, np.float32),
            np.full(self.documents, -1, np.int64),
            np.zeros(self.documents, np.float32),
            np.full(self.documents, -1, np.int64),
        )
        width = self._params.permutations // self._params.bands
        for band in range(self._params.bands):
            keys = np.zeros(self.documents, np.uint64)
            for place in range(band * width, (band + 1) * width):
                keys = keys * _FACTOR + rows[:, place].astype(np.uint64)
            for first, second in _candidates(keys):
                self._compare(rows, first, second, twins)
        return twins

    def _compare(self, rows: Any, first: Numbers, second: Numbers, twins: Twins) -> None:
        for start in range(0, len(first), _PAIRS_AT_ONCE):
            a, b = first[start : start + _PAIRS_AT_ONCE], second[start : start + _PAIRS_AT_ONCE]
            equal = np.count_nonzero(rows[a] == rows[b], axis=1)
            similarity: npt.NDArray[np.float32] = (equal / rows.shape[1]).astype(np.float32)
            near = similarity >= self._params.similarity
            a, b, similarity = a[near], b[near], similarity[near]
            across = self.in_val[a] != self.in_val[b]
            for one, other in ((a, b), (b, a)):
                _keep_best(twins.similarity, twins.twin, one, other, similarity)
                _keep_best(
                    twins.similarity_across,
                    twins.twin_across,
                    one[across],
                    other[across],
                    similarity[across],
                )


def _candidates(keys: Hashes) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of documents in one bucket: each with its next neighbours, and with the bucket's first."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            return
        yield order[same], order[same + distance]
    starts = np.searchsorted(ordered, ordered)
    far = np.flatnonzero(np.arange(len(keys)) - starts > _NEIGHBOURS)
    yield order[starts[far]], order[far]


def _keep_best(
    best: npt.NDArray[np.float32], twin: Numbers, one: Numbers, other: Numbers, similarity: Any
) -> None:
    """Write down better twins; of equally good ones the first in the corpus."""
    for document, candidate, value in zip(one.tolist(), other.tolist(), similarity.tolist(), strict=True):
        if value > best[document] or (value == best[document] and candidate < twin[document]):
            best[document], twin[document] = value, candidate
