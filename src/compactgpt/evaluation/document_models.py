"""Baselines that score each complete document: n-gram models and compressors."""

import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compactgpt import config
from compactgpt.data.token_files import TokenFile
from compactgpt.evaluation.likelihood import DocumentModel, document_text
from compactgpt.evaluation.totals import Floats

if TYPE_CHECKING:
    import tiktoken

Ids = npt.NDArray[np.int64]
COUNTED_AT_ONCE = 2**24  # `make_unigram` counts this many tokens in one step


def make_unigram(train: TokenFile) -> DocumentModel:
    """Return a unigram model of the train split with add-one (Laplace) smoothing.

    p(token) = (count + 1) / (tokens + vocab_size).
    """
    tokens, vocab_size = len(train.tokens), train.header.vocab_size
    counts = np.zeros(vocab_size, np.int64)  # (V,)
    # Count in steps, because a large token file does not fit in memory.
    for start in range(0, tokens, COUNTED_AT_ONCE):
        counts += np.bincount(train.tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    # End-of-text has a probability, as in the neural models, although end-of-text is never scored.
    log_probabilities = np.log(counts + 1) - math.log(tokens + vocab_size)  # (V,)
    facts = {"kind": "unigram", "num_params": vocab_size, "context": "nothing", "train_tokens": tokens}

    def document_nats(split: TokenFile, document: int) -> float:
        return float(-log_probabilities[split.document(document)].sum())

    return DocumentModel(facts, document_nats, reads_tokens=True)


def make_ngram(spec: config.Ngram, train: TokenFile) -> DocumentModel:
    """Return an n-gram model of the train split, with modified Kneser-Ney smoothing."""
    model = train_ngrams(train, spec.order, spec.train_tokens)
    facts = {**spec.model_dump(), "num_params": model.num_ngrams}
    facts |= {"context": f"the {spec.order - 1} tokens before", "train_tokens": model.train_tokens}

    def document_nats(split: TokenFile, document: int) -> float:
        stream = np.concatenate([[split.header.eot_token], split.document(document)]).astype(np.int64)
        return float(-np.log(model.probabilities(stream)).sum())

    return DocumentModel(facts, document_nats, reads_tokens=True)


def make_compressor(
    spec: config.Compressor, train: TokenFile, encoding: "tiktoken.Encoding"
) -> DocumentModel:
    """Return a model whose loss for a document is the compressed size: 8 bits = 8 ln 2 nats per byte.

    The dictionary of zstd is the first `train_megabytes` MB of the train split.
    """
    known = bytearray()
    for document in range(train.header.documents):
        if len(known) >= spec.train_megabytes * 10**6:
            break
        known += document_text(train, encoding, document) + b"\n"
    del known[spec.train_megabytes * 10**6 :]
    context = "the earlier text of the document"
    if known:
        context += f", and {len(known) / 10**6:.3g} MB of the train split"
    compress: Callable[[bytes], bytes]
    if spec.codec == "xz":
        chain = [{"id": lzma.FILTER_LZMA2, "preset": spec.level | lzma.PRESET_EXTREME}]
        compress = partial(lzma.compress, format=lzma.FORMAT_RAW, filters=chain)  # without a file header
    else:
        compress = _zstd(spec.level, bytes(known))

    def document_nats(split: TokenFile, document: int) -> float:
        return 8 * math.log(2) * len(compress(document_text(split, encoding, document)))

    facts = {**spec.model_dump(), "num_params": None, "context": context}
    return DocumentModel(facts, document_nats, reads_tokens=False)


def _zstd(level: int, known: bytes) -> Callable[[bytes], bytes]:
    import zstandard

    settings = zstandard.ZstdCompressionParameters.from_level(
        level,
        dict_size=len(known),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_checksum=False,
        write_content_size=False,
        write_dict_id=False,
    )
    dictionary = None
    if known:
        dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        dictionary.precompute_compress(compression_params=settings)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress


# --- n-grams: Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling


@dataclass(frozen=True)
class _Order:
    """All K n-grams of one length. The id of an n-gram is its index in `keys`."""

    # The key of an n-gram is (id of its context) * (vocabulary size) + (its last token).
    # The context of an n-gram is the n-gram without its last token.
    keys: Ids  # (K,), in ascending order
    weights: Floats  # (K,), the discounted count of the n-gram / the total count of its context
    # For each context, the sum of the discounts / the total count of the context; 1 if the total count is 0
    backoff: Floats  # (contexts,)


@dataclass(frozen=True)
class NgramModel:
    """An n-gram model with interpolated modified Kneser-Ney smoothing.

    The probability of the token w after the tokens c is p(w | c) = weight(c w) + backoff(c) p(w | c').
    c' is c without its first token. If c is empty, p(w | c') is 1 / V, and V is the vocabulary size.
    """

    unigrams: Floats  # (V,), the probability of each token without context
    orders: list[_Order]  # the bigrams, then the trigrams, and so on
    train_tokens: int  # number of tokens that the model was trained on

    @property
    def num_ngrams(self) -> int:
        """The number of stored probabilities: one for each token and for each n-gram."""
        return len(self.unigrams) + sum(len(order.keys) for order in self.orders)

    def probabilities(self, stream: Ids) -> Floats:
        """Return the probability of each token of a document, (T,), given the tokens before it.

        `stream`, (T + 1,), is end-of-text and the document's tokens.
        """
        found = self.unigrams[stream[1:]]
        # The id of each token's context. The first contexts are single tokens: their ids are these tokens.
        context_ids = stream[:-1]
        for order in self.orders:
            if not len(context_ids):
                break
            keys = context_ids * len(self.unigrams) + stream[-len(context_ids) :]
            places = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            is_known = (context_ids >= 0) & (order.keys[places] == keys)
            backoff = np.where(context_ids >= 0, order.backoff[context_ids], 1.0)
            reached = found[-len(context_ids) :]  # only the tokens that have a context of this length
            reached[:] = np.where(is_known, order.weights[places], 0.0) + backoff * reached
            context_ids = np.where(is_known, places, -1)[:-1]  # -1: the context is not in the train split
        return found


def train_ngrams(train: TokenFile, order: int, max_tokens: int) -> NgramModel:
    """Train an n-gram model on the first documents of a split, up to `max_tokens` tokens."""
    V = train.header.vocab_size
    documents = max(1, int(np.searchsorted(train.offsets, max_tokens, side="right")) - 1)
    offsets = train.offsets[: documents + 1]
    # End-of-text precedes and follows each document.
    end_of_text = np.array([train.header.eot_token], np.int64)
    stream = np.concatenate([end_of_text, train.tokens[: offsets[-1]]]).astype(np.int64)  # (N + 1,)
    # The position of each token in its document. The first position is 1.
    positions = np.arange(1, len(stream)) - np.repeat(offsets[:-1], np.diff(offsets))  # (N,)
    ids = stream  # the id of the n-gram that ends at each position
    # For each n-gram length, a tuple of three arrays, (K,), with one element for each different n-gram: the
    # key (see `_Order`), the number of occurrences, and the id of the suffix (all tokens but the first).
    found: list[tuple[Ids, Ids, Ids]] = []
    for length in range(2, order + 1):
        # An n-gram may begin at position 0, the end-of-text token before the document, but not earlier.
        ends = np.flatnonzero(positions >= length - 1) + 1
        if not len(ends):  # no document is long enough for an n-gram of this length
            break
        keys, inverse, occurrences = np.unique(
            ids[ends - 1] * V + stream[ends], return_inverse=True, return_counts=True
        )
        suffixes = np.empty(len(keys), np.int64)
        suffixes[inverse] = ids[ends]
        found.append((keys, occurrences, suffixes))
        ids = np.full(len(stream), -1)
        ids[ends] = inverse
    orders = []
    num_contexts = V  # the context of a bigram is one token
    for place, (keys, counts, _) in enumerate(found):
        if place + 1 < len(found):  # the count of the longest n-grams stays the number of occurrences
            # Kneser-Ney: the count of an n-gram is the number of different tokens that precede the n-gram.
            preceding = np.bincount(found[place + 1][2], minlength=len(keys))
            # No token precedes end-of-text, so n-grams with this first token keep the number of occurrences.
            counts[preceding > 0] = preceding[preceding > 0]
        orders.append(_Order(keys, *_discount(counts, keys // V, num_contexts)))
        num_contexts = len(keys)  # these n-grams are the contexts of the next order
    weights, backoff = _discount(np.bincount(found[0][2], minlength=V), np.zeros(V, np.int64), 1)
    return NgramModel(weights + backoff / V, orders, int(offsets[-1]))


def _discount(counts: Ids, context_ids: Ids, num_contexts: int) -> tuple[Floats, Floats]:
    """Return `weights` and `backoff` of an `_Order`. `counts` and `context_ids` are (K,)."""
    discounts = _discounts_of(counts)[np.minimum(counts, 3)]  # (K,)
    totals = np.bincount(context_ids, counts, num_contexts)
    removed = np.bincount(context_ids, discounts, num_contexts)
    backoff = np.divide(removed, totals, out=np.ones(num_contexts), where=totals > 0)
    return (counts - discounts) / np.maximum(totals, 1)[context_ids], backoff


def _discounts_of(counts: Ids) -> Floats:
    """Return the discounts of the counts 0, 1, 2, and 3 or more (Chen and Goodman 1998)."""
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found >= 0).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])  # KenLM's values for a corpus that is too small for the formula
