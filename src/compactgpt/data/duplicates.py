"""Find documents that repeat other documents, and text of val that is also in train.

A word consists of letters, digits and underscores, in lower case. As in appendix C of the GPT-3 paper (Brown
et al. 2020), punctuation, white space and case are ignored. In scripts that write no spaces between words,
such as Chinese and Thai, each character is a word: a sentence as one word would be equal only as a whole. A
64-bit hash represents each word. A polynomial of the word hashes represents a run, which is n consecutive
words. Documents are compared in three ways:

    same words      Two documents have the same words in the same order.
    near duplicate  Two documents have similar sets of 5-word runs. Their MinHash signatures (Broder 1997;
                    computed by rensa) are compared by locality-sensitive hashing in bands. The similarity
                    is the share of equal signature values, an estimate of the Jaccard similarity.
    overlap         The share of a val document's 13-word runs that are also in train. GPT-3 and
                    lm-evaluation-harness use 13 words too (docs/decontamination.md).

This module compares the bands itself, because rensa's LSH needs 1.3 KB of memory per document. It also
accepts only signature objects, which can't be created from the arrays that workers send. In this module a
signature takes 4 bytes per value.

Shapes: N documents, V documents of val, G different runs of words in val.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.workers import ordered_map
from compactgpt.config import Inspection
from compactgpt.data.documents import RowGroup, read_row_group
from compactgpt.data.tokenization import SplitRule

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Similarities = npt.NDArray[np.float64]

# Scripts without spaces between words, by Unicode's blocks; with their marks: some are Thai or Khmer vowels.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\uaa60-\uaa7f"  # Burmese and its relatives
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"  # Khmer, Tai Le, New Tai Lue, Tai Tham
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese kana and repetition marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2^64 is a bijection
_NEIGHBOURS = 8  # a document is compared with this many next documents in its bucket
_OWNERS_PER_RUN = 10  # about how many train documents are stored for one run of val


def word_hashes(text: str) -> Hashes:
    """Return the hash of each word of a text. (words,)"""
    return np.fromiter(map(_word_hash, _WORD.findall(text.lower())), np.uint64)


@lru_cache(maxsize=2**19)  # most words occur many times
def _word_hash(word: str) -> int:
    return _hash(word.encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def run_hashes(words: Hashes, length: int) -> Hashes:
    """Return the hash of each run of `length` words. (max(0, words - length + 1),)"""
    count = max(0, len(words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + words[offset : offset + count]  # wraps around at 2^64
    return hashes


# --- reading the documents


@dataclass(frozen=True)
class Digest:
    """Hashes and sizes of n documents: the documents of one row group, or all N documents."""

    ids: npt.NDArray[np.uint8]  # (n, 16)
    byte_lengths: Numbers  # (n,)
    in_val: Flags  # (n,)
    words: Hashes  # (n,) one hash of all words of a document
    signatures: npt.NDArray[np.uint32]  # (n, permutations) MinHash
    hit_runs: Numbers  # (hits,) index in `val_runs` of a run that a document contains
    hit_documents: Numbers  # (hits,) number of the document that contains the run


def val_runs(groups: Iterable[RowGroup], rule: SplitRule, length: int) -> Hashes:
    """Read the val documents, and return the sorted hashes of their runs of words. (G,)"""
    hashes = [np.empty(0, np.uint64)]
    for group in groups:
        documents = read_row_group(group)
        texts = [each.text for each in compress(documents, rule.in_val(group, documents))]
        hashes += [np.unique(run_hashes(word_hashes(text), length)) for text in texts]
    return np.unique(np.concatenate(hashes))


def digest_group(group: RowGroup, params: Inspection, rule: SplitRule, runs_file: Path) -> Digest:
    """Return the digest of one row group: a pure function of files, so any process can run it."""
    wanted: Hashes = np.load(runs_file, mmap_mode="r")  # memory-mapped: all workers share it
    documents = read_row_group(group)
    word_digests: list[int] = []
    shingles: list[Hashes] = []
    hits: list[Numbers] = []
    for document in documents:
        words = word_hashes(document.text)
        # A document without words is hashed by its id, so that it equals no other document.
        word_digests.append(_hash(words.tobytes() or bytes.fromhex(document.id)))
        runs = run_hashes(words, params.shingle_words)
        shingles.append(runs if len(runs) else np.array(word_digests[-1:], np.uint64))
        runs = run_hashes(words, params.overlap_words)
        positions = np.searchsorted(wanted, runs)
        positions[positions == len(wanted)] = 0  # greater than all of `wanted`, so never equal to wanted[0]
        is_hit = wanted[positions] == runs if len(wanted) else np.zeros(len(runs), np.bool_)
        hits.append(np.unique(positions[is_hit]))
    return Digest(
        np.frombuffer(bytes.fromhex("".join(each.id for each in documents)), np.uint8).reshape(-1, 16),
        np.array([len(each.text.encode()) for each in documents], np.int64),
        np.array(rule.in_val(group, documents), np.bool_),
        np.array(word_digests, np.uint64),
        _signatures(shingles, params),
        np.concatenate([np.empty(0, np.int64), *hits]),
        np.repeat(np.arange(len(hits)), [len(each) for each in hits]),
    )


def _signatures(shingles: list[Hashes], params: Inspection) -> npt.NDArray[np.uint32]:
    """Return the MinHash signature of each document. (n, permutations)"""
    import rensa

    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), ends, params.permutations, params.seed
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, params.permutations)


def digest_documents(
    groups: list[RowGroup],
    params: Inspection,
    rule: SplitRule,
    total: int,
    num_workers: int = 1,
    progress: Progress = silent,
) -> Digest:
    """Return the digest of all `total` documents, whose splits `rule` says.

    The corpus is read twice: first to find the runs of val, then to digest every document. The result does
    not depend on the number of workers.
    """
    runs = val_runs(groups, rule, params.overlap_words)
    num_owners = np.zeros(len(runs), np.int32)
    signatures = np.empty((total, params.permutations), np.uint32)  # the largest array: filled in place
    parts: list[Digest] = []
    documents = 0
    with TemporaryDirectory() as scratch:
        runs_file = Path(scratch) / "runs.npy"
        np.save(runs_file, runs)
        digest = partial(digest_group, params=params, rule=rule, runs_file=runs_file)
        for part in ordered_map(digest, groups, num_workers):
            signatures[documents : documents + len(part.ids)] = part.signatures
            hit_runs, hit_documents = _limit_owners(part, num_owners)
            numbers = hit_documents + documents  # document numbers in the corpus
            kept = replace(part, signatures=signatures[:0], hit_runs=hit_runs, hit_documents=numbers)
            parts.append(kept)
            documents += len(part.ids)
            progress(documents, total)
    names = [field.name for field in fields(Digest) if field.name != "signatures"]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Digest(signatures=signatures, **columns)


def _limit_owners(part: Digest, num_owners: npt.NDArray[np.int32]) -> tuple[Numbers, Numbers]:
    """Return a part's hits in val, and its hits in train for runs with fewer than `_OWNERS_PER_RUN` owners.

    An owner is a train document that contains the run. The function adds the part's owners to `num_owners`.
    Without this limit, a text in every file of a corpus, such as a licence, would fill the memory.
    """
    of_val = part.in_val[part.hit_documents]
    is_kept = of_val | (num_owners[part.hit_runs] < _OWNERS_PER_RUN)
    np.add.at(num_owners, part.hit_runs[~of_val], 1)
    return part.hit_runs[is_kept], part.hit_documents[is_kept]


# --- twins: documents with the same or similar words


@dataclass(frozen=True)
class Twins:
    """The twin of each document: the most similar other document."""

    twin: Numbers  # (N,) number of the twin, -1 if there is none
    similarity: Similarities  # (N,) similarity to the twin, 0 if there is none


def find_same_words(corpus: Digest) -> tuple[Twins, Twins]:
    """Find documents with the same words.

    Returns:
        Each document's twin among all documents, and its twin among the documents of the other split.
    """
    first, second = _candidates(corpus.words, corpus.in_val)
    return _find_twins(corpus, first, second, np.ones(len(first)))


def find_near_duplicates(corpus: Digest, params: Inspection) -> tuple[Twins, Twins]:
    """Find near duplicates.

    Returns:
        Each document's twin among all documents, and its twin among the documents of the other split.
    """
    width = params.permutations // params.bands
    found = []  # a pair with several equal bands is added several times
    for band in range(params.bands):
        keys = np.zeros(len(corpus.words), np.uint64)
        for column in range(band * width, (band + 1) * width):
            keys = keys * _FACTOR + corpus.signatures[:, column]
        first, second = _candidates(keys, corpus.in_val)
        equal = np.zeros(len(first), np.int64)
        for values in corpus.signatures.T:  # one column at a time, to save memory
            equal += values[first] == values[second]
        similarity = equal / params.permutations
        is_near = similarity >= params.similarity
        found.append((first[is_near], second[is_near], similarity[is_near]))
    first, second, similarity = map(np.concatenate, zip(*found, strict=True))
    return _find_twins(corpus, first, second, similarity)


def _candidates(keys: Hashes, in_val: Flags) -> tuple[Numbers, Numbers]:
    """Return pairs of documents with equal keys. Documents with equal keys form a bucket.

    Each document is paired with the next `_NEIGHBOURS` documents of its bucket and with the bucket's first
    document. All pairs would be too many: a text that occurs 100,000 times has 5 billion pairs. Train
    documents come first in a bucket, so each val document is paired with a train document if there is one.
    """
    order = np.lexsort((in_val, keys))  # by key, then train before val, then in corpus order
    ordered = keys[order]
    bucket_starts = np.searchsorted(ordered, ordered)
    repeats = np.flatnonzero(bucket_starts < np.arange(len(keys)))
    first, second = [bucket_starts[repeats]], [repeats]  # positions in `order`
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        first.append(same)
        second.append(same + distance)
    return order[np.concatenate(first)], order[np.concatenate(second)]


def _find_twins(
    corpus: Digest, first: Numbers, second: Numbers, similarity: Similarities
) -> tuple[Twins, Twins]:
    """Return each document's twin from all pairs, and its twin from the pairs of train with val."""
    across = corpus.in_val[first] != corpus.in_val[second]
    size = len(corpus.words)
    nearest = _nearest(size, first, second, similarity)
    return nearest, _nearest(size, first[across], second[across], similarity[across])


def _nearest(size: int, first: Numbers, second: Numbers, similarity: Similarities) -> Twins:
    """Return each document's most similar twin; with equal similarity, the first in the corpus."""
    document, other = np.concatenate([first, second]), np.concatenate([second, first])
    both = np.concatenate([similarity, similarity])
    order = np.lexsort((other, -both, document))
    documents, positions = np.unique(document[order], return_index=True)
    best = order[positions]
    twins = Twins(np.full(size, -1, np.int64), np.zeros(size))
    twins.twin[documents], twins.similarity[documents] = other[best], both[best]
    return twins


# --- overlap


@dataclass(frozen=True)
class Overlap:
    """Numbers of runs of words in each val document, and how many are also in train."""

    documents: Numbers  # (V,) number of the val document in the corpus
    runs: Numbers  # (V,) number of different runs of the document
    seen: Numbers  # (V,) number of these runs that are also in train
    twins: Numbers  # (V,) number of the train document with most of these runs, -1 if there is none

    @property
    def share(self) -> Similarities:
        """Share of each val document's runs that are also in train. (V,)"""
        return self.seen / np.maximum(self.runs, 1)


def find_overlap(corpus: Digest) -> Overlap:
    """Return how many runs of each val document are in train, and the train document with most of them."""
    of_val = corpus.in_val[corpus.hit_documents]
    holders, holder_runs = corpus.hit_documents[of_val], corpus.hit_runs[of_val]  # sorted by document
    by_run = np.argsort(corpus.hit_runs[~of_val], kind="stable")
    owners, owner_runs = corpus.hit_documents[~of_val][by_run], corpus.hit_runs[~of_val][by_run]
    # owners[low[hit] : high[hit]] are the train documents that contain the run of a hit.
    low = np.searchsorted(owner_runs, holder_runs)
    high = np.searchsorted(owner_runs, holder_runs, side="right")
    documents, size = np.flatnonzero(corpus.in_val), len(corpus.in_val)
    runs = np.bincount(holders, minlength=size)[documents]
    seen = np.bincount(holders[high > low], minlength=size)[documents]
    twins = np.full(len(documents), -1, np.int64)
    for row in np.flatnonzero(seen).tolist():
        start, end = np.searchsorted(holders, [documents[row], documents[row] + 1])
        found = [owners[low[hit] : high[hit]] for hit in range(start, end)]
        names, counts = np.unique(np.concatenate(found), return_counts=True)
        twins[row] = names[counts.argmax()]
    return Overlap(documents, runs, seen, twins)
