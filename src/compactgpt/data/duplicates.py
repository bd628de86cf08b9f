"""Documents that say the same: equal and nearly equal ones, and val text that is also in train.

All three look at words: runs of letters, digits and underscores, lower-cased, as in appendix C of the GPT-3
paper (Brown et al. 2020), which ignores punctuation, white space and case. A word is its 64-bit hash, and a
run of words a polynomial of these hashes.

    same words      two documents with the same hash of all their words
    near duplicate  MinHash (Broder 1997; rensa computes it) of runs of 5 words, found by locality-sensitive
                    hashing in bands; similarity is the share of equal signature values, an estimate of the
                    Jaccard similarity
    overlap         the share of a val document's runs of 13 words that some train document has; 13 is GPT-3's
                    length, and lm-evaluation-harness' (docs/decontamination.md)

Memory: 12 bytes per document and one band of the signatures, which are on disk with 4 bytes per value. The
index of rensa would need 1.3 KB per document (docs/decisions). The runs of val are in memory: val is a
small share, and of a document with more than RUNS_PER_DOCUMENT runs only those with the lowest hashes are
kept. V documents of val, G runs in them, N documents in all.
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

from compactgpt.common.console import Progress, silent
from compactgpt.common.workers import ordered_map
from compactgpt.config import Inspection
from compactgpt.data.documents import RowGroup, read_row_group

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication is a bijection
_NEIGHBOURS = 8  # of a bucket, in the order of documents, that a document is compared with
_PAIRS_AT_ONCE = 2**16
RUNS_PER_DOCUMENT = 2**18
_POSTINGS = 10  # train documents that are kept for one run of val


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
    """How much of val is in train."""

    documents: Numbers  # (V,) numbers of val's documents in the corpus
    runs: Numbers  # (V,) distinct runs of each
    seen: Numbers  # (V,) of these, in train
    twins: Numbers  # (V,) number of the train document that has most of them, -1 for none


@dataclass(frozen=True)
class Twins:
    """The nearest near duplicate of every document."""

    similarity: npt.NDArray[np.float32]  # (N,) 0 for none
    twin: Numbers  # (N,) -1 for none
    similarity_across: npt.NDArray[np.float32]  # (N,) the same, of those in the other split
    twin_across: Numbers  # (N,)


def id_array(ids: Iterable[bytes]) -> npt.NDArray[Any]:
    """Return 16-byte ids as an array that sorts and compares. (n,)"""
    return np.array(list(ids), "S16")


def word_hashes(text: str) -> Hashes:
    """Hash each word of a text. (words,)"""
    return np.fromiter(map(_word_hash, _WORD.findall(text.lower())), np.uint64)


@lru_cache(maxsize=2**19)  # nearly every word of a text occurred before
def _word_hash(word: str) -> int:
    # A lone surrogate can't come here: documents.py refuses it.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def run_hashes(words: Hashes, length: int) -> Hashes:
    """Hash each run of `length` words. (max(0, words - length + 1),)"""
    count = max(0, len(words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes


def save_val_runs(folder: Path, groups: Iterable[RowGroup], val_ids: npt.NDArray[Any], length: int) -> None:
    """Find val's documents, and write their distinct runs: arrays `ids`, `runs` and the pairs between them.

    Writes:
        ids (V,) S16 sorted; documents (V,) their numbers in the corpus, in its order; runs (G,) sorted;
        pair_runs and pair_documents (pairs,): val document k, in the order of the corpus, has run g.
    """
    wanted = np.sort(val_ids)
    numbers: list[int] = []
    hashes: list[Hashes] = []
    start = 0
    for group in groups:
        documents = read_row_group(group)
        held_out = _contains(wanted, id_array(bytes.fromhex(each.id) for each in documents))
        for row in np.flatnonzero(held_out).tolist():
            numbers.append(start + row)
            runs = np.unique(run_hashes(word_hashes(documents[row].text), length))
            hashes.append(runs[:RUNS_PER_DOCUMENT])
        start += len(documents)
    every = np.concatenate([*hashes, np.empty(0, np.uint64)])
    runs, pair_runs = np.unique(every, return_inverse=True)
    np.save(folder / "ids.npy", wanted)
    np.save(folder / "documents.npy", np.array(numbers, np.int64))
    np.save(folder / "runs.npy", runs)
    np.save(folder / "pair_runs.npy", pair_runs.astype(np.int64))
    np.save(folder / "pair_documents.npy", np.repeat(np.arange(len(hashes)), [len(h) for h in hashes]))


@lru_cache(maxsize=1)
def _val_arrays(folder: Path) -> tuple[npt.NDArray[Any], Hashes]:
    """Load what a worker needs of val, once per process."""
    return np.load(folder / "ids.npy"), np.load(folder / "runs.npy")


def _contains(ordered: npt.NDArray[Any], values: npt.NDArray[Any]) -> Flags:
    """Return which values are in a sorted array. (values,)"""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    positions = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: Flags = ordered[positions] == values
    return found


def _find(val_runs: Hashes, runs: Hashes) -> Numbers:
    """Return the indices of the runs of val that are among these. (hits,)"""
    hits: Numbers = np.searchsorted(val_runs, np.unique(runs[_contains(val_runs, runs)]))
    return hits


def digest_group(task: Task) -> Digest:
    """Digest the documents of one row group: a pure function of files on disk, for any process."""
    params = task.params
    val_ids, val_runs = _val_arrays(task.val)
    documents = read_row_group(task.group)
    ids = id_array(bytes.fromhex(each.id) for each in documents)
    in_val = _contains(val_ids, ids)
    wholes: list[int] = []
    shingles: list[Hashes] = []
    found: list[Numbers] = []
    for document, held_out in zip(documents, in_val.tolist(), strict=True):
        words = word_hashes(document.text)
        # A document without words equals only itself.
        content = words.tobytes() or bytes.fromhex(document.id)
        wholes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
        own = run_hashes(words, params.shingle_words)
        shingles.append(own if len(own) else np.array(wholes[-1:], np.uint64))
        found.append(_find(val_runs, words[:0] if held_out else run_hashes(words, params.overlap_words)))
    return Digest(
        ids,
        np.array([len(each.text.encode()) for each in documents], np.int64),
        in_val,
        np.array(wholes, np.uint64),
        _signatures(shingles, params),
        np.concatenate([np.empty(0, np.int64), *found]),
        np.repeat(np.arange(len(found)), [len(each) for each in found]),
    )


def _signatures(shingles: list[Hashes], params: Inspection) -> npt.NDArray[np.uint32]:
    """Compute the MinHash signatures of documents. (n, permutations)"""
    import rensa

    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), ends, params.permutations, params.seed
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, params.permutations)


class Scan:
    """One pass over a corpus that collects what the three questions need, and answers them.

    Args:
        params: what to look for.
        scratch: an empty folder for the signatures and val's runs.
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
        """Digest each row group, and yield the digests for other checks."""
        save_val_runs(self._scratch, groups, val_ids, self._params.overlap_words)
        self._num_owners = np.zeros(len(np.load(self._scratch / "runs.npy", mmap_mode="r")), np.int32)
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
        new = self._num_owners[digest.runs] < _POSTINGS
        self._postings.append(np.stack([digest.runs[new], digest.owners[new] + self.documents]))
        np.add.at(self._num_owners, digest.runs, 1)
        self.documents += len(digest.ids)

    def overlap(self) -> Overlap:
        """Measure how much of each val document is in train, and in which document most of it is."""
        documents, pair_runs, pair_documents = (
            np.load(self._scratch / f"{name}.npy") for name in ("documents", "pair_runs", "pair_documents")
        )
        size = len(documents)
        seen = np.bincount(pair_documents, weights=self._num_owners[pair_runs] > 0, minlength=size)
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
        """Find for each document the first other one with the same words, in the other split if there is one.

        Returns:
            Its number, -1 for none. (N,)
        """
        order = np.argsort(self.words, kind="stable")
        words, twins = self.words[order], np.full(self.documents, -1, np.int64)
        edges = np.flatnonzero(np.r_[True, words[1:] != words[:-1], True])
        for group in np.flatnonzero(np.diff(edges) > 1).tolist():
            members = order[edges[group] : edges[group + 1]]
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
            for column in range(band * width, (band + 1) * width):
                keys = keys * _FACTOR + rows[:, column].astype(np.uint64)
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
    """Yield pairs of documents in one bucket: each with its next neighbours, and with the bucket's first."""
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
    """Keep the better twin; of equally good ones the first in the corpus."""
    for document, candidate, value in zip(one.tolist(), other.tolist(), similarity.tolist(), strict=True):
        if value > best[document] or (value == best[document] and candidate < twin[document]):
            best[document], twin[document] = value, candidate
