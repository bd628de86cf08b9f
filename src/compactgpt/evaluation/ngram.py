"""Train an n-gram model on token files: interpolated modified Kneser-Ney smoothing.

Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling, section 3. For the
tokens `c` before a token `w`, and `c'`, the same tokens without the first one:

    p(w | c) = (count(c w) - D(count(c w))) / total(c) + backoff(c) p(w | c')

D is one of three discounts, for counts of 1, 2 and at least 3. `backoff(c)` is the sum of the discounts after
c divided by total(c), so the probabilities sum to 1. The lowest order is interpolated with 1 / V. A document
is end-of-text, its tokens, end-of-text. No n-gram crosses the end of a document.

Shapes: V tokens of the vocabulary, N positions of the train split, K different n-grams of one order.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compactgpt.data.token_files import TokenFile

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """All n-grams of one order above 1; the id of an n-gram is its index."""

    # (K,) ascending: c V + w, where w is the last token and c is the id of the n-gram without w.
    keys: Ids
    weights: Floats  # (K,) the discounted count divided by the total of the context
    backoff: Floats  # (contexts,) weight of the lower order; 1 for a context that no token follows


@dataclass(frozen=True)
class NgramModel:
    """A trained n-gram model."""

    unigrams: Floats  # (V,) probabilities of the lowest order
    orders: list[_Order]  # of the bigrams, the trigrams, ...
    train_tokens: int  # number of tokens that the model was trained on

    @property
    def num_ngrams(self) -> int:
        """The number of stored probabilities: those of all tokens and of all n-grams."""
        return len(self.unigrams) + sum(len(order.keys) for order in self.orders)

    def probabilities(self, stream: Ids) -> Floats:
        """Return the probability of each token of a document after the tokens before it. (T,)

        Args:
            stream: end-of-text and the tokens of the document. (T + 1,)
        """
        found = self.unigrams[stream[1:]]
        contexts = stream[:-1]  # id of the context of each target, or -1: not in the train split
        for order in self.orders:
            if not len(contexts):
                break
            keys = contexts * len(self.unigrams) + stream[-len(contexts) :]
            places = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            is_known = (contexts >= 0) & (order.keys[places] == keys)
            backoff = np.where(contexts >= 0, order.backoff[contexts], 1.0)
            reached = found[-len(contexts) :]  # the first targets of a document have shorter contexts
            reached[:] = np.where(is_known, order.weights[places], 0.0) + backoff * reached
            contexts = np.where(is_known, places, -1)[:-1]
        return found


def train_ngrams(train: TokenFile, order: int, max_tokens: int) -> NgramModel:
    """Return the n-gram model of the first documents of a split, up to `max_tokens` tokens.

    An n-gram of the highest order counts its occurrences. An n-gram of a lower order counts the different
    tokens that occur before it; at the start of a document, it counts its occurrences.
    """
    V = train.header.vocab_size
    documents = max(1, int(np.searchsorted(train.offsets, max_tokens, side="right")) - 1)
    offsets = train.offsets[: documents + 1]
    end_of_text = np.array([train.header.eot_token], np.int64)
    stream = np.concatenate([end_of_text, train.tokens[: offsets[-1]]]).astype(np.int64)  # (N + 1,)
    # Distance of each position to the end-of-text before it. An n-gram that is longer would cross it.
    distance = np.arange(1, len(stream)) - np.repeat(offsets[:-1], np.diff(offsets))  # (N,)
    ids, sizes = stream, [V]  # id of the n-gram that ends at each position
    found: list[tuple[Ids, Ids, Ids]] = []  # keys, occurrences and suffixes of the n-grams of each order
    for length in range(2, order + 1):
        ends = np.flatnonzero(distance >= length - 1) + 1
        if not len(ends):  # all documents are shorter
            break
        keys, inverse, occurrences = np.unique(
            ids[ends - 1] * V + stream[ends], return_inverse=True, return_counts=True
        )
        suffixes = np.empty(len(keys), np.int64)
        suffixes[inverse] = ids[ends]  # the n-gram without its first token
        found.append((keys, occurrences, suffixes))
        ids = np.full(len(stream), -1)
        ids[ends] = inverse
        sizes.append(len(keys))
    orders = []
    for place, (keys, counts, _) in enumerate(found):
        if place + 1 < len(found):
            before = np.bincount(found[place + 1][2], minlength=len(keys))  # different tokens before each
            counts[before > 0] = before[before > 0]  # 0: the n-gram starts a document
        orders.append(_Order(keys, *_discount(counts, keys // V, sizes[place])))
    weights, backoff = _discount(np.bincount(found[0][2], minlength=V), np.zeros(V, np.int64), 1)
    return NgramModel(weights + backoff / V, orders, int(offsets[-1]))


def _discount(counts: Ids, contexts: Ids, size: int) -> tuple[Floats, Floats]:
    """Return the weight of each n-gram, (K,), and the backoff of each of `size` contexts."""
    discounts = _discounts_of(counts)[np.minimum(counts, 3)]  # (K,)
    totals = np.bincount(contexts, counts, size)
    removed = np.bincount(contexts, discounts, size)
    backoff = np.divide(removed, totals, out=np.ones(size), where=totals > 0)
    return (counts - discounts) / np.maximum(totals, 1)[contexts], backoff


def _discounts_of(counts: Ids) -> Floats:
    """Return the discounts of the counts 0, 1, 2 and at least 3 (Chen and Goodman 1998).

    Too few n-grams to estimate them, as in a tiny corpus, give the values 0.5, 1 and 1.5, as in KenLM.
    """
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if min(n1, n2, n3) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found >= 0).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])
