"""The n-gram model equals the textbook's formula, computed with dictionaries, and sums to 1."""

from collections import Counter
from functools import cache
from itertools import product

import numpy as np
import pytest

from compactgpt.data.token_files import open_tokens
from compactgpt.evaluation.document_models import train_ngrams
from tests.support.tiny_corpus import write_token_file

V, END = 6, 5  # five tokens and end-of-text


def save_documents(path, documents):
    about = {"vocab_size": V, "eot_token": END, "tokenizer_sha256": "0" * 64}
    rows = [(bytes(16), 1, np.array(document, np.int64)) for document in documents]
    write_token_file(path, rows, **about)
    return open_tokens(path)


def textbook(documents, order):
    """Return p(token, context) of interpolated modified Kneser-Ney by Chen and Goodman's equations."""
    padded = [(END, *document, END) for document in documents]
    grams = {n: [d[i : i + n] for d in padded for i in range(len(d) - n + 1)] for n in range(1, order + 1)}
    seen = {n: Counter(found) for n, found in grams.items()}

    @cache
    def count(gram):
        if len(gram) == order or (len(gram) > 1 and gram[0] == END):
            return seen[len(gram)][gram]
        return len({longer[0] for longer in seen[len(gram) + 1] if longer[1:] == gram})

    @cache
    def discount(n, times):
        counts = Counter(count(gram) for gram in seen[n])
        n1, n2, n3, n4 = (counts[k] for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3):
            return (0, 0.5, 1, 1.5)[min(times, 3)]
        y = n1 / (n1 + 2 * n2)
        found = (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        return (found if min(found) >= 0 else (0, 0.5, 1, 1.5))[min(times, 3)]

    @cache
    def probability(token, context):
        n = len(context) + 1
        lower = probability(token, context[1:]) if context else 1 / V
        counts = {other: count((*context, other)) for other in range(V)}
        total = sum(counts.values())
        if not total:
            return lower
        removed = sum(discount(n, times) for times in counts.values())
        return (counts[token] - discount(n, counts[token])) / total + removed / total * lower

    return probability


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("size", [4, 400])  # tokens of all documents; with 4, no discount can be estimated
def test_every_probability_is_the_textbooks_and_they_sum_to_1(tmp_path, order, size):
    generator = np.random.default_rng(3)
    weights = [0.4, 0.3, 0.2, 0.07, 0.03]
    documents = [[], *(generator.choice(5, size // 4, p=weights).tolist() for _ in range(4))]
    model = train_ngrams(save_documents(tmp_path / "train.tokens", documents), order, 10**6)
    expected = textbook(documents, order)
    inside = product(range(5), repeat=order - 1)
    at_start = ((END, *rest) for n in range(order - 1) for rest in product(range(5), repeat=n))
    for context in [*inside, *at_start]:
        found = [model.probabilities(np.array([*context, token]))[-1] for token in range(V)]
        assert found == pytest.approx([expected(token, context) for token in range(V)], rel=1e-12)
        assert sum(found) == pytest.approx(1, rel=1e-12)
        assert min(found) > 0
    # Every token of a document, the first ones with shorter contexts.
    stream = [END, 0, 1, 1, 4, 0, 2, 0]
    together = model.probabilities(np.array(stream))
    contexts = [tuple(stream[max(0, i - order + 1) : i]) for i in range(1, len(stream))]
    each = [expected(token, context) for token, context in zip(stream[1:], contexts, strict=True)]
    assert together.tolist() == pytest.approx(each, rel=1e-12)
    assert model.probabilities(np.array([END])).tolist() == []


def test_only_the_first_documents_are_read_and_each_ngram_is_counted(tmp_path):
    train = save_documents(tmp_path / "train.tokens", [[0, 1, 0], [2, 3], [4]])
    assert train_ngrams(train, 3, 100).train_tokens == 9  # with end-of-text
    part = train_ngrams(train, 3, 8)
    assert part.train_tokens == 7
    assert part.num_ngrams == V + 7 + 5  # no n-gram crosses the end of a document
