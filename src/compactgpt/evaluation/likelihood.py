"""Score a language model on the val split, and report its per-document losses.

Shapes: B windows, T tokens, C channels, V tokens of the vocabulary, N targets (scored tokens).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData, NotFinite
from compactgpt.common.storage import sha256_file
from compactgpt.config import Likelihood, View
from compactgpt.data.token_files import (
    Stream,
    TokenFile,
    Window,
    cut_windows,
    document_streams,
    evaluation_windows,
    pack_documents,
)
from compactgpt.evaluation.totals import Counts, Floats, Positions, Totals, by_position, figures

# Only functions that run a neural model import torch, because the import is slow.
if TYPE_CHECKING:
    import tiktoken
    import torch


# The value of `model.context` in the report of a neural model, which sees only earlier tokens of a window.
IN_WINDOW = "the window of the document"
HEAD_ROWS = 256  # number of targets whose logits are computed at once (51 MB of float32)
CPU_TOKENS = 1024  # tokens in one forward pass on a CPU: more tokens save no time
SORTED_WINDOWS = 4096  # number of windows that are sorted by length to avoid padding

# A step is a function that reads the next T tokens of each sequence, (B, T). The step returns the hidden
# state of each sequence's last token, (B, C).
Step = Callable[["torch.Tensor"], "torch.Tensor"]
# A score maps logits, (N, V), and targets, (N,), to values, (N, ...). It may overwrite the logits.
Score = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class DocumentScores:
    """A model's losses, one per document, in the order of the documents in the split."""

    nats: Floats  # (documents,), negative log-likelihood of each document
    own_tokens: Counts | None  # (documents,), tokens of the model's tokenizer; None for compressors
    positions: Positions | None = None  # None for n-gram models and compressors, which have no windows


def strided_windows(streams: Iterable[Stream], context: int, stride: int) -> Iterator[Window]:
    """Cut streams into windows of at most `context` tokens, which overlap if `stride` is below `context`.

    Each window ends at most `stride` tokens after the end of the previous window. Each token except the start
    token is a target in exactly one window, as in perplexity.md of transformers' documentation.
    """
    for document, stream in streams:
        start, end = 0, min(context, len(stream) - 1)
        while start < end:
            fed = stream[max(0, end - context) : end]
            yield Window(document, fed, stream[start + 1 : end + 1])
            start, end = end, min(end + stride, len(stream) - 1)


@dataclass(frozen=True)
class Codec:
    """A model's tokenizer: functions from text to tokens and back."""

    encode: Callable[[str], list[int]]  # text -> tokens; `<|endoftext|>` in a text is plain text
    decode: Callable[[list[int]], str]
    first_token: int  # the start token: it precedes a document, and ends a generated text


@dataclass(frozen=True)
class NeuralModel:
    """A causal neural model whose logits are `hidden(tokens) @ head.T`."""

    facts: Mapping[str, Any]  # facts for the report: kind, num_params, context, and the source of the weights
    # `hidden` maps tokens, (B, T) int64 padded on the right, to hidden states, (B, T, C).
    hidden: "Callable[[torch.Tensor], torch.Tensor]"
    head: "torch.Tensor"  # (V, C), the output weights without the rows that pad the vocabulary
    block_size: int  # the largest T that `hidden` accepts
    batch_size: int  # windows in one forward pass
    windows: Callable[[TokenFile, int], Iterable[Window]] = evaluation_windows
    streams: Callable[[TokenFile], Iterable[Stream]] = document_streams
    codec: Codec | None = None  # None: the model can't run tasks or generate text
    # `decoder(padding)` returns a `Step` with a new key-value cache. `padding`, (B,), is the number of
    # padding tokens on the left of each text. If `decoder` is None, the model generates text without a cache.
    decoder: "Callable[[torch.Tensor], Step] | None" = None

    def score(self, split: TokenFile, window: int, progress: Progress) -> DocumentScores:
        """Return the per-document losses. Each window covers as much text as `window` GPT-2 tokens."""
        progress = partial(progress, figures={"context": f"{window:,} GPT-2 tokens"})
        return self._sum_by_document(split, self.windows(split, window), window, progress)

    def score_view(
        self, split: TokenFile, view: View, likelihood: Likelihood, progress: Progress
    ) -> DocumentScores:
        """Return the per-document losses in windows of the model's own context.

        `view` is a way to cut documents into windows: those of `strided` overlap, those of `own` do not.
        """
        context, stride = self.view_sizes(view, likelihood)
        streams = self.streams(split)
        windows = cut_windows(streams, context)
        shown = f"{context:,} tokens"
        if view == "strided":
            windows = strided_windows(streams, context, stride)
            shown += ", overlapping"
        progress = partial(progress, figures={"context": shown})
        return self._sum_by_document(split, windows, stride, progress)

    def view_sizes(self, view: View, likelihood: Likelihood) -> tuple[int, int]:
        """Return the length and the stride of the windows of `view`, in the model's tokens."""
        context = min(self.block_size, likelihood.own_context)
        return context, context if view == "own" else max(1, round(context * likelihood.stride_share))

    def _sum_by_document(
        self, split: TokenFile, windows: Iterable[Window], stride: int, progress: Progress
    ) -> DocumentScores:
        documents = split.header.documents
        nats, own_tokens = np.zeros(documents), np.zeros(documents, np.int64)
        buckets = (self.block_size - 1).bit_length() + 1
        positions = Positions(np.zeros((documents, buckets)), np.zeros((documents, buckets), np.int64))
        lengths = np.diff(split.offsets) - 1  # (documents,), number of tokens without end-of-text
        num_windows = int(np.sum(-(-lengths // stride)))
        progress(0, num_windows)
        for done, (scored, values) in enumerate(target_nats(self, windows), 1):
            nats[scored.document] += values.sum()
            own_tokens[scored.document] += len(values)
            # The first position in a window is 1. `Positions` defines the buckets.
            position = np.arange(len(scored.tokens) - len(values), len(scored.tokens)) + 1
            bucket = np.ceil(np.log2(position)).astype(np.int64)
            np.add.at(positions.nats[scored.document], bucket, values)
            np.add.at(positions.tokens[scored.document], bucket, 1)
            if done % self.batch_size == 0 and done < num_windows:
                progress(done, num_windows)
        progress(num_windows, num_windows)
        return DocumentScores(nats, own_tokens, positions)


@dataclass(frozen=True)
class DocumentModel:
    """A model that scores each complete document, without windows."""

    facts: Mapping[str, Any]  # facts for the report: kind, num_params and context
    document_nats: Callable[[TokenFile, int], float]  # (split, index of a document) -> the document's nats
    reads_tokens: bool  # False for a compressor, which reads bytes

    def score(self, split: TokenFile, _window: int, progress: Progress) -> DocumentScores:
        """Return the per-document losses. The window has no effect."""
        total = split.header.documents
        nats = np.empty(total)
        for document in range(total):
            nats[document] = self.document_nats(split, document)
            progress(document + 1, total)
        return DocumentScores(nats, np.diff(split.offsets) - 1 if self.reads_tokens else None)


LanguageModel = NeuralModel | DocumentModel


# --- running a neural model


def target_nats(model: NeuralModel, windows: Iterable[Window]) -> Iterator[tuple[Window, Floats]]:
    """Yield each window with the nats of its N targets, (N,), but not in the order of `windows`."""

    def score(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        import torch

        log_probabilities = torch.log_softmax(logits, 1, out=logits)  # (N, V), overwrites the logits
        return -log_probabilities.gather(1, targets[:, None])[:, 0]  # (N,)

    return score_targets(model, windows, score)


def score_targets(
    model: NeuralModel, windows: Iterable[Window], score: Score
) -> Iterator[tuple[Window, Floats]]:
    """Yield each window with the scores of its N targets, (N, ...), but not in the order of `windows`.

    Raises BadConfig if a window is longer than the model's context.
    """
    remaining = iter(windows)
    while group := list(islice(remaining, SORTED_WINDOWS)):
        group.sort(key=lambda window: -len(window.tokens))  # `_score_batch` needs the longest window first
        if len(group[0].tokens) > model.block_size:
            raise BadConfig(
                f"a window of {len(group[0].tokens):,} tokens does not fit the model's context of "
                f"{model.block_size:,}: lower evaluation.likelihood.window"
            )
        start = 0
        while start < len(group):
            size = model.batch_size
            if model.head.device.type == "cpu":
                size = max(1, min(size, CPU_TOKENS // len(group[start].tokens)))
            batch = group[start : start + size]
            yield from zip(batch, _score_batch(model, batch, score), strict=True)
            start += size


def _score_batch(model: NeuralModel, batch: list[Window], score: Score) -> list[Floats]:
    """Return the target scores of each window. The first window must be the longest."""
    import torch

    device, T = model.head.device, len(batch[0].tokens)
    tokens = torch.zeros(len(batch), T, dtype=torch.int64)  # padded on the right
    predicting = torch.zeros(len(batch), T, dtype=torch.bool)  # positions that predict a target
    for row, window in enumerate(batch):
        end = len(window.tokens)
        tokens[row, :end] = torch.from_numpy(window.tokens)
        predicting[row, end - len(window.targets) : end] = True  # earlier tokens are only context
    targets = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(device)  # (N,)
    with torch.inference_mode():
        hidden = model.hidden(tokens.to(device))  # (B, T, C)
        hidden = hidden[predicting.to(device)]  # (N, C), in the order of the targets
        # Compute logits in chunks that share one buffer, because all logits could exceed the memory.
        logits = hidden.new_empty(min(HEAD_ROWS, len(targets)), len(model.head))
        scores = []
        for start in range(0, len(targets), HEAD_ROWS):
            chunk = hidden[start : start + HEAD_ROWS]
            chunk_logits = torch.mm(chunk, model.head.T, out=logits[: len(chunk)])  # (HEAD_ROWS, V) at most
            scores.append(score(chunk_logits.float(), targets[start : start + HEAD_ROWS]))
        values: Floats = torch.cat(scores).cpu().double().numpy()  # (N, ...)
    return np.split(values, np.cumsum([len(window.targets) for window in batch])[:-1])


# --- preparing the documents to score, and reporting their losses


def with_documents(split: TokenFile, rows: Iterable[tuple[bytes, int, npt.NDArray[Any]]]) -> TokenFile:
    """Return a token file in memory with the tokenizer of `split` and the documents of `rows`.

    A row is (document id, length in bytes, tokens).
    """
    tokenizer = split.header.model_dump(include={"vocab_size", "eot_token", "tokenizer_sha256"})
    return pack_documents(split.path, rows, **tokenizer)


def select_documents(split: TokenFile, documents: Sequence[int]) -> TokenFile:
    """Return a token file in memory with the documents at the given indices."""
    rows = ((split.ids[i].tobytes(), int(split.byte_lengths[i]), split.document(i)) for i in documents)
    return with_documents(split, rows)


def scored_split(split: TokenFile, encoding: "tiktoken.Encoding", likelihood: Likelihood) -> TokenFile:
    """Return a split with the first `document_tokens` tokens of each document.

    No document ends inside a UTF-8 character.
    """
    # Without the limit, a very long document would dominate the metrics.
    limit = likelihood.document_tokens
    if limit is None:
        return split
    rows = []
    for index in range(split.header.documents):
        tokens, length = split.document(index), int(split.byte_lengths[index])
        if len(tokens) > limit:
            tokens, text = tokens[:limit], encoding.decode_bytes(tokens[:limit].tolist())
            while text.decode(errors="ignore").encode() != text:
                tokens = tokens[:-1]
                text = encoding.decode_bytes(tokens.tolist())
            length = len(text)
        rows.append((split.ids[index].tobytes(), length, tokens))
    return with_documents(split, rows)


def document_text(split: TokenFile, encoding: "tiktoken.Encoding", document: int) -> bytes:
    """Return a document's UTF-8 text. Raises BadData if `split` has a tokenizer other than `encoding`."""
    text = encoding.decode_bytes(split.document(document).tolist())
    if len(text) != split.byte_lengths[document]:
        raise BadData(
            f"document {split.document_ids[document]} of {split.path} decodes to {len(text):,} bytes, but "
            f"{split.byte_lengths[document]:,} bytes were tokenized: run `dvc repro -f download tokenization`"
        )
    return text


def evaluate(
    model: LanguageModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    likelihood: Likelihood,
    progress: Progress = silent,
) -> Totals:
    """Return a model's per-document losses on a split.

    Raises BadData if the split is empty or has a tokenizer other than `encoding`.
    Raises NotFinite for an infinite or NaN loss.
    """
    tokens = np.diff(split.offsets) - 1
    if not tokens.sum():
        raise BadData(f"{split.path} has no token to score: add text, or raise tokenization.val_fraction")
    words = [len(document_text(split, encoding, index).decode().split()) for index in range(len(tokens))]
    scores = model.score(split, likelihood.window, progress)
    views: dict[str, Floats] = {}
    if isinstance(model, NeuralModel):
        context, _ = model.view_sizes("own", likelihood)
        is_scored = model.windows is evaluation_windows and context == likelihood.window
        for view in likelihood.views:
            if view == "own" and is_scored:  # `scores` was computed with these windows
                views[view] = scores.nats
            else:
                views[view] = model.score_view(split, view, likelihood, progress).nats
    for nats in (scores.nats, *views.values()):
        if not np.isfinite(nats).all():
            document = int(np.isfinite(nats).argmin())  # the first document with an infinite or NaN loss
            raise NotFinite(
                f"document {split.document_ids[document]} of {split.path} got {nats[document]} nats: the "
                "model's weights or arithmetic are broken. Train again, or get the weights again"
            )
    return Totals(
        split.document_ids,
        split.byte_lengths,
        tokens,
        scores.own_tokens,
        scores.nats,
        np.array(words, np.int64),
        views,
        scores.positions,
    )


def summarize(
    name: str, model: LanguageModel, totals: Totals, split: TokenFile, likelihood: Likelihood
) -> dict[str, Any]:
    """Return the report of one model.

    Loss and perplexity are per GPT-2 token for every model. Word perplexity is exp(nats / words), as in
    lm-evaluation-harness.
    """
    own_tokens = None if totals.own_tokens is None else int(totals.own_tokens.sum())
    report = {
        "model": {"name": name, **model.facts},
        "validation": {
            "sha256": sha256_file(split.path),
            "documents": len(totals.ids),
            "tokens": int(totals.tokens.sum()),
            "bytes": int(totals.bytes.sum()),
            "words": None if totals.words is None else int(totals.words.sum()),
        },
        "window": likelihood.window,
        **figures(totals.nats, totals),
        "own_tokens": own_tokens,
        "loss_per_own_token": float(totals.nats.sum()) / own_tokens if own_tokens else None,
    }
    if isinstance(model, NeuralModel):
        report["views"] = {}
        for view, nats in totals.views.items():
            context, stride = model.view_sizes(cast(View, view), likelihood)
            sizes = {"context": context, "stride": stride}
            report["views"][view] = sizes | figures(nats, totals)
    if totals.positions is not None:
        report["by_position"] = by_position(totals.positions)
    return report


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics for reports/metrics.json, which `dvc exp show` and `dvc metrics diff` show."""
    found: dict[str, float] = {
        name: report[name]["value"] for name in ("loss", "perplexity", "bits_per_byte") if report[name]
    }
    if cloze := report["tasks"].get("cloze", {}).get("accuracy"):
        found["cloze_accuracy"] = cloze["value"]
    return found
