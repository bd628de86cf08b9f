"""Find documents that repeat other documents, and val text that is also in train.

An n-gram is a fixed number of consecutive words of a document.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.workers import ordered_map
from compactgpt.config import Inspection
from compactgpt.data.documents import RowGroup, read_row_group
from compactgpt.data.tokenization import SplitRule

if TYPE_CHECKING:
    import pandas as pd

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

# Unicode ranges of the scripts without spaces between words, combining marks included.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\uaa60-\uaa7f"  # Burmese and other languages in its script
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"  # Khmer, Tai Le, New Tai Lue, Tai Tham
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese kana and repetition marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# An odd number: multiplying by an odd number modulo 2^64 keeps different hashes different.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# `_candidates` lists the documents with equal keys in a bucket. Each document but the first is paired with at
# most this many documents that follow in the bucket.
_NEIGHBOURS = 8
# For each n-gram, `digest_documents` stores only the first train documents with the n-gram, about this many.
_TRAIN_DOCUMENTS_PER_NGRAM = 10


def word_hashes(text: str) -> Hashes:
    """Return the hash of each word of a text, shape (words,). Punctuation and case are ignored.

    In a script without spaces, each character is a word.
    """
    return np.fromiter((_hash(word.encode()) for word in _WORD.findall(text.lower())), np.uint64)


@lru_cache(maxsize=2**19)  # keeps the hashes of 2^19 words, since most words occur many times
def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """Return the hash of each n-gram of `length` words, given the hash of each word."""
    count = max(0, len(words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + words[offset : offset + count]  # modulo 2^64
    return hashes


# --- reading the documents


class Digest(NamedTuple):
    """What `find_twins` and `find_overlap` need to know about the n documents of a row group or corpus."""

    documents: "pd.DataFrame"  # n rows; columns: id, source, bytes (of text), in_val (is in the val split)
    signatures: npt.NDArray[np.uint32]  # (n, permutations) MinHash values
    # Each row has a document and one of its n-grams. N-grams that are not in val have no row.
    # Columns: document (row of `documents`), ngram (index in the result of `val_ngrams`).
    hits: "pd.DataFrame"


def val_ngrams(groups: Iterable[RowGroup], rule: SplitRule, length: int) -> Hashes:
    """Return the sorted hashes of all n-grams of `length` words in the val documents, shape (n-grams,)."""
    hashes = [np.empty(0, np.uint64)]
    for group in groups:
        documents = read_row_group(group)
        texts = [each.text for each in compress(documents, rule.in_val(group, documents))]
        hashes += [np.unique(ngram_hashes(word_hashes(text), length)) for text in texts]
    return np.unique(np.concatenate(hashes))


def digest_group(group: RowGroup, params: Inspection, rule: SplitRule, ngrams_file: Path) -> Digest:
    """Return the `Digest` of one row group. The file `ngrams_file` contains the result of `val_ngrams`."""
    import pandas as pd
    import rensa

    wanted: Hashes = np.load(ngrams_file, mmap_mode="r")  # memory-mapped, so that the workers share one copy
    documents = read_row_group(group)
    shingles: list[Hashes] = []  # for each document, the hashes that MinHash compares
    hits: list[Numbers] = []
    for document in documents:
        words = word_hashes(document.text)
        ngrams = ngram_hashes(words, params.shingle_words)
        if not len(ngrams):
            # The document is shorter than an n-gram: hash all its words or, if it has no words, its id.
            content = words.tobytes() or bytes.fromhex(document.id)
            ngrams = np.array([_hash(content)], np.uint64)
        shingles.append(ngrams)
        ngrams = ngram_hashes(words, params.overlap_words)
        positions = np.searchsorted(wanted, ngrams)
        is_inside = positions < len(wanted)  # False if a hash is greater than all hashes in `wanted`
        positions, ngrams = positions[is_inside], ngrams[is_inside]
        hits.append(np.unique(positions[wanted[positions] == ngrams]))
    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), ends, params.permutations, params.seed
    )
    columns = {
        "id": [each.id for each in documents],
        "source": [each.source for each in documents],
        "bytes": [len(each.text.encode()) for each in documents],
        "in_val": rule.in_val(group, documents),
    }
    numbers = np.repeat(np.arange(len(hits)), [len(each) for each in hits])
    signatures = np.array(matrix.to_rows(), np.uint32).reshape(-1, params.permutations)
    hit_table = pd.DataFrame({"document": numbers, "ngram": np.concatenate(hits)})
    return Digest(pd.DataFrame(columns), signatures, hit_table)


def digest_documents(
    groups: list[RowGroup],
    params: Inspection,
    rule: SplitRule,
    total: int,
    num_workers: int,
    progress: Progress = silent,
) -> Digest:
    """Return the `Digest` of the whole corpus, which has `total` documents. Reads the corpus twice."""
    import pandas as pd

    ngrams = val_ngrams(groups, rule, params.overlap_words)
    num_train = np.zeros(len(ngrams), np.int32)  # (n-grams,) number of train documents with this n-gram
    parts: list[Digest] = []
    documents = 0
    with TemporaryDirectory() as scratch:
        ngrams_file = Path(scratch) / "ngrams.npy"
        np.save(ngrams_file, ngrams)
        digest = partial(digest_group, params=params, rule=rule, ngrams_file=ngrams_file)
        for part in ordered_map(digest, groups, num_workers):
            hits = part.hits
            of_val = part.documents["in_val"].to_numpy()[hits["document"]]
            # Keep only some of the train documents that contain an n-gram. Otherwise the hits would fill the
            # memory, because a common text, such as a licence, is in very many documents.
            is_kept = of_val | (num_train[hits["ngram"]] < _TRAIN_DOCUMENTS_PER_NGRAM)
            np.add.at(num_train, hits["ngram"].to_numpy()[~of_val], 1)
            # Convert each document's number in the row group to its number in the corpus.
            hits = hits.assign(document=hits["document"] + documents)
            parts.append(part._replace(hits=hits[is_kept]))
            documents += len(part.documents)
            progress(documents, total)
    return Digest(
        pd.concat([part.documents for part in parts], ignore_index=True),
        np.concatenate([part.signatures for part in parts]),
        pd.concat([part.hits for part in parts], ignore_index=True),
    )


# --- twins: documents with similar words


def find_twins(corpus: Digest, params: Inspection) -> "pd.DataFrame":
    """Return a table of pairs. A document has up to two rows: one for a twin in train, one for a twin in val.

    A twin is the most similar document that was found in a split, with a similarity of at least
    `params.similarity`. Columns: document and twin (row numbers in `corpus.documents`), score (estimated
    similarity), in_val (whether document is in val), across (whether the two are in different splits).
    """
    import pandas as pd

    in_val, signatures = corpus.documents["in_val"].to_numpy(), corpus.signatures
    # Search with numpy, because the search in the library rensa takes 1.3 KB of memory per document.
    width = params.permutations // params.bands
    found = []
    # A band is `width` signature columns. Documents with equal values in a band are compared (Broder 1997).
    for band in range(params.bands):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * width, (band + 1) * width):
            keys = keys * _FACTOR + signatures[:, column]
        first, second = _candidates(keys, in_val)
        equal = np.zeros(len(first), np.int64)
        for values in signatures.T:  # one column at a time, to save memory
            equal += values[first] == values[second]
        # The share of equal MinHash values estimates the Jaccard similarity of two documents.
        pairs = pd.DataFrame({"document": first, "twin": second, "score": equal / params.permutations})
        found.append(pairs[pairs["score"] >= params.similarity])
    found += [pairs.rename(columns={"document": "twin", "twin": "document"}) for pairs in found]
    twins = pd.concat(found)
    twins["in_val"] = in_val[twins["document"]]
    twins["across"] = twins["in_val"] != in_val[twins["twin"]]
    twins = twins.sort_values(["document", "score", "twin"], ascending=[True, False, True])
    return twins.drop_duplicates(["document", "across"])


def _candidates(keys: Hashes, in_val: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Return pairs of documents whose `keys` are equal, as two arrays of document numbers."""
    # A bucket is all documents with one key. Train documents come first in a bucket.
    order = np.lexsort((in_val, keys))
    ordered = keys[order]
    bucket_starts = np.searchsorted(ordered, ordered)
    repeats = np.flatnonzero(bucket_starts < np.arange(len(keys)))
    # Pair each document only with the first document of its bucket and with `_NEIGHBOURS` documents that
    # follow in the bucket, because all pairs are too many: 100,000 copies of a text have 5 billion pairs.
    first, second = [bucket_starts[repeats]], [repeats]  # indices in `order`
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        first.append(same)
        second.append(same + distance)
    return order[np.concatenate(first)], order[np.concatenate(second)]


# --- overlap: text of val documents that is also in train documents


def find_overlap(corpus: Digest) -> "pd.DataFrame":
    """Return a table that says how much of each val document is also in train (GPT-3, appendix C).

    Columns: document (its row number in `corpus.documents`), twin (row number of the train document that has
    the largest number of its n-grams; -1: none has any), ngrams (how many different n-grams the document
    has), seen (how many of these n-grams are in train), score (seen / ngrams).
    """
    import pandas as pd

    in_val, hits = corpus.documents["in_val"].to_numpy(), corpus.hits
    of_val = in_val[hits["document"]]
    shared = hits[of_val].merge(hits[~of_val].rename(columns={"document": "twin"}), on="ngram")
    counts = shared.groupby(["document", "twin"], as_index=False).size()
    # The sort is stable: if several train documents share equally many n-grams, the first one is the twin.
    counts = counts.sort_values("size", ascending=False, kind="stable").drop_duplicates("document")
    overlap = pd.DataFrame(
        {
            "ngrams": hits[of_val].groupby("document").size(),
            "seen": shared.groupby("document")["ngram"].nunique(),
            "twin": counts.set_index("document")["twin"],
        },
        index=pd.Index(np.flatnonzero(in_val), name="document"),
    )
    overlap = overlap.fillna({"ngrams": 0, "seen": 0, "twin": -1}).astype(np.int64)
    overlap["score"] = overlap["seen"] / overlap["ngrams"].clip(lower=1)
    return overlap.reset_index()
