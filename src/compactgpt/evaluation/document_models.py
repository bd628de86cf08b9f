"""Baselines that score each complete document: n-gram models and compressors."""

import lzma
import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from compactgpt import config
from compactgpt.data.token_files import TokenFile
from compactgpt.evaluation.likelihood import DocumentModel, document_text
from compactgpt.evaluation.ngram import train_ngrams

if TYPE_CHECKING:
    import tiktoken

COUNTED_AT_ONCE = 2**24  # tokens that `make_unigram` counts in one step


def make_unigram(train: TokenFile) -> DocumentModel:
    """Return a unigram model: each token's probability is its smoothed frequency in the train split.

    p(token) = (count + 1) / (tokens + vocab_size), which is add-one (Laplace) smoothing.
    """
    tokens, vocab_size = len(train.tokens), train.header.vocab_size
    counts = np.zeros(vocab_size, np.int64)  # (V,)
    for start in range(0, tokens, COUNTED_AT_ONCE):  # in steps, to limit memory
        counts += np.bincount(train.tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    # (V,); end-of-text has a probability, as in the neural models, although it is never scored
    log_probabilities = np.log(counts + 1) - math.log(tokens + vocab_size)
    facts = {"kind": "unigram", "num_params": vocab_size, "context": "nothing", "train_tokens": tokens}

    def document_nats(split: TokenFile, document: int) -> float:
        return float(-log_probabilities[split.document(document)].sum())

    return DocumentModel(facts, document_nats, reads_tokens=True)


def make_ngram(spec: config.Ngram, train: TokenFile) -> DocumentModel:
    """Return an n-gram model of the train split, with modified Kneser-Ney smoothing; see ngram.py."""
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
    """Return a model that scores a document by its compressed size, without the file format's own bytes.

    A document's nats are ln 2 x 8 x its compressed bytes. With `train_megabytes`, the dictionary is the start
    of the train split: the compressor knows the corpus, as a trained model does.
    """
    context = "the document before"
    if spec.train_megabytes:
        context += f", and {spec.train_megabytes} MB of the train split"
    known = bytearray()
    for document in range(train.header.documents):
        if len(known) >= spec.train_megabytes * 10**6:
            break
        known += document_text(train, encoding, document) + b"\n"
    if spec.codec == "xz":
        chain = [{"id": lzma.FILTER_LZMA2, "preset": spec.level | lzma.PRESET_EXTREME}]
        compress = partial(lzma.compress, format=lzma.FORMAT_RAW, filters=chain)  # no .xz container
    else:
        compress = _zstd(spec.level, bytes(known[: spec.train_megabytes * 10**6]))

    def document_nats(split: TokenFile, document: int) -> float:
        return 8 * math.log(2) * len(compress(document_text(split, encoding, document)))

    facts = {**spec.model_dump(), "num_params": None, "context": context}
    return DocumentModel(facts, document_nats, reads_tokens=False)


def _zstd(level: int, known: bytes) -> "partial[bytes]":
    """Return a function that compresses bytes with zstd and a dictionary, without optional header fields."""
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
    return partial(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress)
