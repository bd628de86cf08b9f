"""Baselines that score each complete document: n-gram models and compressors."""

import lzma
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt import config
from compactgpt.common.console import Progress
from compactgpt.data.token_files import TokenFile
from compactgpt.evaluation.likelihood import DocumentScores, document_text
from compactgpt.evaluation.ngram import train_ngrams

if TYPE_CHECKING:
    import tiktoken

COUNTED_AT_ONCE = 2**24  # tokens that `make_unigram` counts in one step


@dataclass(frozen=True)
class DocumentModel:
    """A model that scores each complete document, without windows."""

    facts: Mapping[str, Any]
    document_nats: Callable[[TokenFile, int], float]  # (split, index of a document) -> nats
    reads_tokens: bool

    def score(self, split: TokenFile, _window: int, progress: Progress) -> DocumentScores:
        """Return the negative log-likelihood of every document, in nats."""
        total = split.header.documents
        nats = np.empty(total)
        for document in range(total):
            nats[document] = self.document_nats(split, document)
            progress(document + 1, total)
        return DocumentScores(nats, np.diff(split.offsets) - 1 if self.reads_tokens else None)


def make_unigram(train: TokenFile) -> DocumentModel:
    """Return a unigram model: each token's probability is its smoothed frequency in the train split.

    p(token) = (count + 1) / (tokens + vocab_size), which is add-one (Laplace) smoothing. The end-of-text
    token has a probability, as in the neural models, although it is never scored.
    """
    tokens, vocab_size = len(train.tokens), train.header.vocab_size
    counts = np.zeros(vocab_size, np.int64)  # (V,)
    for start in range(0, tokens, COUNTED_AT_ONCE):  # in steps, to limit memory
        counts += np.bincount(train.tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    log_probabilities = np.log(counts + 1) - math.log(tokens + vocab_size)  # (V,)
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
    """Return a model that scores a document by its compressed size.

    A document's nats are ln 2 x 8 x its compressed bytes, without the file format's own bytes. A short
    document compresses badly without a dictionary. With `train_megabytes`, the dictionary is the start of the
    train split: the compressor knows the corpus, as a trained model does.
    """
    context = "the document before"
    if spec.train_megabytes:
        context += f", and {spec.train_megabytes} MB of the train split"
    known = bytearray()
    for document in range(train.header.documents):
        if len(known) >= spec.train_megabytes * 10**6:
            break
        known += document_text(train, encoding, document) + b"\n"
    dictionary = bytes(known[: spec.train_megabytes * 10**6])
    compress = _xz(spec.level) if spec.codec == "xz" else _zstd(spec.level, dictionary)

    def document_nats(split: TokenFile, document: int) -> float:
        return 8 * math.log(2) * len(compress(document_text(split, encoding, document)))

    facts = {**spec.model_dump(), "num_params": None, "context": context}
    return DocumentModel(facts, document_nats, reads_tokens=False)


def _xz(level: int) -> Callable[[bytes], bytes]:
    """Return a function that compresses bytes with LZMA2, without the .xz container."""
    chain = [{"id": lzma.FILTER_LZMA2, "preset": level | lzma.PRESET_EXTREME}]
    return partial(lzma.compress, format=lzma.FORMAT_RAW, filters=chain)


def _zstd(level: int, known: bytes) -> Callable[[bytes], bytes]:
    """Return a function that compresses bytes with zstd, without optional header fields.

    Args:
        level: the compression level.
        known: the dictionary; may be empty.
    """
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
