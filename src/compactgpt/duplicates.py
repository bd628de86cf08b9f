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
runs of val are in memory: val is a small share. V documents of val, G runs in them, N documents in all.
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
from compactgpt.documents import RowGroup, read_row_group
from compactgpt.parallel import ordered_map
from compactgpt.progress import Progress, silent

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
_KNOWN_WORDS = 2**20  # that a process remembers the hashes of
_NEIGHBOURS = 8  # of a bucket, in the order of documents, that a document is compared with
_PAIRS_AT_ONCE = 2**16
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


def _whole_hash(words: Hashes, document_id: str) -> np.uint64:
    """Hash all words of a document, in their order; one without words equals none but itself."""
    content = words.tobytes() or bytes.fromhex(document_id)
    return np.uint64(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))


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
        documents = read_row_group(group)
        held_out = _contains(wanted, id_array(bytes.fromhex(document.id) for document in documents))
        for place in np.flatnonzero(held_out).tolist():
            numbers.append(number + place)
            hashes.append(np.unique(run_hashes(word_hashes(documents[place].text), length)))
        number += len(documents)
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
    import rensa

    documents = read_row_group(task.group)
    val_ids, val_runs = _val_arrays(task.val)
    ids = id_array(bytes.fromhex(document.id) for document in documents)
    in_val = _contains(val_ids, ids)
    words = [word_hashes(document.text) for document in documents]
    wholes = [_whole_hash(each, document.id) for each, document in zip(words, documents, strict=True)]
    shingles = [
        found if len(found := run_hashes(each, task.params.shingle_words)) else np.array([whole])
        for each, whole in zip(words, wholes, strict=True)
    ]
    ends = np.cumsum([0, *map(len, shingles)])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), ends.astype(np.uint64), task.params.permutations, task.params.seed
    )
    runs, owners = _hits(words, in_val, val_runs, task.params.overlap_words)
    return Digest(
        ids,
        np.array([len(document.text.encode("utf-8")) for document in documents], np.int64),
        in_val,
        np.array(wholes, np.uint64),
        np.array(matrix.to_rows(), np.uint32),
        runs,
        owners,
    )


def _hits(words: list[Hashes], in_val: Flags, val_runs: Hashes, length: int) -> tuple[Numbers, Numbers]:
    """Pairs (index of a run of val, document outside val that has it), each once."""
    found = [
        run_hashes(each, length) if not held_out else np.empty(0, np.uint64)
        for each, held_out in zip(words, in_val, strict=True)
    ]
    hashes = np.concatenate(found)
    owners = np.repeat(np.arange(len(found)), [len(each) for each in found])
    if not len(val_runs):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.minimum(np.searchsorted(val_runs, hashes), len(val_runs) - 1)
    hit = val_runs[places] == hashes
    pairs = np.unique(np.stack([places[hit], owners[hit]], axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


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
