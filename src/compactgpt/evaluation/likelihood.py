"""Any model + the val split -> nats, tokens and bytes of every document, and the report made from them.

One path for every model: a `LanguageModel` turns a split into nats by document; `evaluate` checks them
and puts them beside the documents; `summarize` divides the sums once. How a model gets its nats is its
own affair, but all see the same text: `data.evaluation_windows`, fed after the end-of-text token or the
token before the window; end-of-text is never scored, every other token exactly once.

A neural model is a `Neural`: hidden states and the rows that turn them into logits. `target_nats` scores
its windows, with at most HEAD_ROWS rows of logits in memory, whatever the batch. torch is imported when
a neural model runs, so that a compressor need not wait for it. It can be looked at in two more views, in
its own tokens and with a context of its own, C tokens:

- own: windows of C, without overlap;
- strided: windows of C that move on by S; each scores what none before it scored, so that a token has
  C - S tokens of context, or all there are (transformers, perplexity.md).

B windows, T tokens of the longest, C channels, V rows of the vocabulary.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotFinite
from compactgpt.common.storage import sha256_file, write_bytes
from compactgpt.config import Likelihood, View
from compactgpt.data.token_files import TokenFile, Window, evaluation_windows
from compactgpt.evaluation.metrics import Interval, bits_per_byte, perplexity, ratio_bootstrap

if TYPE_CHECKING:
    import tiktoken
    import torch

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

IN_WINDOW = "the window of the document"  # what a model saw before a target, as its report says it
HEAD_ROWS = 256  # hidden states that meet the vocabulary at once: 51 MB of logits at 50,257 in float32
_VIEW = "nats_"  # opens the names of the parquet's columns of other views
CPU_TOKENS = 1024  # that a CPU takes through the trunk at once: more cost memory and are no faster
SORTED_WINDOWS = 4096  # windows that are ordered by length together, so that few places are padding


@dataclass(frozen=True)
class Positions:
    """Sums by place in the window: bucket 0 is the first target, bucket b the places 2^(b-1) + 1 to 2^b."""

    nats: Floats  # (documents, buckets)
    tokens: Counts  # (documents, buckets) in the model's own tokens


@dataclass(frozen=True)
class Nats:
    """What a model tells of a split, in the split's order."""

    nats: Floats  # (documents,) summed over the document
    own_tokens: Counts | None  # (documents,) in the model's own tokens; None where it has none
    positions: Positions | None = None  # None where it has no window


class LanguageModel(Protocol):
    """Anything that gives every document of a split a number of nats."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says of the model: kind, num_params, context and whatever tells it apart."""

    def score(self, split: TokenFile, window: int, progress: Progress, /) -> Nats:
        """Sum the nats of every document; a model with a context cuts documents at `window` tokens."""


Stream = tuple[int, npt.NDArray[np.int64]]  # a document's index; the token before it and all its tokens


def document_streams(split: TokenFile) -> Iterator[Stream]:
    """Every document in the split's own tokens, behind end-of-text."""
    for index in range(split.header.documents):
        yield index, np.concatenate([[split.header.eot_token], split.document(index)]).astype(np.int64)


def strided_windows(streams: Iterable[Stream], context: int, stride: int) -> Iterator[Window]:
    """Cut streams into windows of at most `context` tokens that move on by `stride`.

    Every token but the first of a stream is a target exactly once: the first window scores all that it
    can, each later one its last `stride`, or what is left, with all the context that fits before them.
    """
    for document, stream in streams:
        start, end = 0, min(context, len(stream) - 1)
        while start < end:
            fed = stream[max(0, end - context) : end]
            yield Window(document, start, fed, stream[start + 1 : end + 1])
            start, end = end, min(end + stride, len(stream) - 1)


def own_windows(streams: Iterable[Stream], context: int) -> Iterator[Window]:
    """Cut streams into windows of at most `context` tokens without overlap."""
    for document, stream in streams:
        for start in range(0, len(stream) - 1, context):
            end = min(start + context, len(stream) - 1)
            yield Window(document, start, stream[start:end], stream[start + 1 : end + 1])


@dataclass(frozen=True)
class Codec:
    """How a model spells text."""

    encode: Callable[[str], list[int]]  # names of special tokens are plain text
    decode: Callable[[list[int]], str]
    first_token: int  # stands before a document, and ends one


Step = Callable[["torch.Tensor"], "torch.Tensor"]  # (B, T) tokens -> (B, C) hidden state of the last


@dataclass(frozen=True)
class Neural:
    """A causal neural model behind the one interface.

    Its logits must be `hidden(tokens) @ head.T`, and a place must see nothing to its right: windows of a
    batch are padded on the right, and what stands there is never looked at.
    """

    facts: Mapping[str, Any]
    hidden: "Callable[[torch.Tensor], torch.Tensor]"  # (B, T) int64 -> (B, T, C)
    head: "torch.Tensor"  # (V, C); without the padding rows of the vocabulary
    block_size: int  # most tokens it can be fed
    batch_size: int  # windows in one forward pass
    windows: Callable[[TokenFile, int], Iterable[Window]] = evaluation_windows
    streams: Callable[[TokenFile], Iterable[Stream]] = document_streams
    codec: Codec | None = None  # where it is to be asked, or to write
    # Opens a text of which each next part is read once; it is given how many places of each row are padding,
    # on the left. (B,) -> Step
    decoder: "Callable[[torch.Tensor], Step] | None" = None

    def score(self, split: TokenFile, window: int, progress: Progress) -> Nats:
        """Sum the nats of every document, each model's text cut at the same places."""
        return self._sum(split, self.windows(split, window), window, progress)

    def view(self, split: TokenFile, view: View, likelihood: Likelihood, progress: Progress) -> Nats:
        """Sum the nats of every document in one of the other views; see the module."""
        context, stride = self.view_sizes(view, likelihood)
        streams = self.streams(split)
        windows = (
            own_windows(streams, context) if view == "own" else strided_windows(streams, context, stride)
        )
        return self._sum(split, windows, stride, progress)

    def view_sizes(self, view: View, likelihood: Likelihood) -> tuple[int, int]:
        """Tokens of context of a view, and tokens that it moves on by."""
        context = min(self.block_size, likelihood.own_context)
        return context, context if view == "own" else max(1, round(context * likelihood.stride_share))

    def _sum(self, split: TokenFile, windows: Iterable[Window], step: int, progress: Progress) -> Nats:
        documents = split.header.documents
        nats, own_tokens = np.zeros(documents), np.zeros(documents, np.int64)
        buckets = (self.block_size - 1).bit_length() + 1
        place_nats, place_tokens = np.zeros((documents, buckets)), np.zeros((documents, buckets), np.int64)
        lengths = np.diff(split.offsets) - 1
        total, started = int(np.sum(-(-lengths // step))), time.monotonic()
        for done, (scored, values) in enumerate(target_nats(self, windows), 1):
            nats[scored.document] += values.sum()
            own_tokens[scored.document] += len(values)
            bucket = position_buckets(len(scored.tokens) - len(values), len(scored.tokens))
            np.add.at(place_nats[scored.document], bucket, values)
            np.add.at(place_tokens[scored.document], bucket, 1)
            if done % self.batch_size == 0 and done < total:
                rate = own_tokens.sum() / (time.monotonic() - started)
                progress(done, total, {"tokens/s": f"{rate:,.0f}"})
        progress(total, total)
        return Nats(nats, own_tokens, Positions(place_nats, place_tokens))


def position_buckets(start: int, end: int) -> Counts:
    """Bucket of each place from `start` to `end` of a window, counted from 0: see `Positions`."""
    places: Counts = np.ceil(np.log2(np.arange(start + 1, end + 1))).astype(np.int64)
    return places


# (N, V) logits, which it may overwrite, and (N,) targets -> (N, ...)
Score = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def target_nats(model: Neural, windows: Iterable[Window]) -> Iterator[tuple[Window, Floats]]:
    """Score windows: nats of each target; see `score_targets`."""

    def nats(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
        import torch

        return -torch.log_softmax(logits, 1, out=logits).gather(1, targets[:, None])[:, 0]

    return score_targets(model, windows, nats)


def score_targets(model: Neural, windows: Iterable[Window], score: Score) -> Iterator[tuple[Window, Floats]]:
    """Score windows, long ones first within each SORTED_WINDOWS of them.

    Yields:
        Each window once, with what `score` makes of the logits and id of each of its targets. (T, ...)

    Raises:
        BadConfig: a window is longer than the model's context.
    """
    remaining = iter(windows)
    while group := list(islice(remaining, SORTED_WINDOWS)):
        group.sort(key=lambda window: -len(window.tokens))
        if len(group[0].tokens) > model.block_size:
            raise BadConfig(
                f"a window of {len(group[0].tokens):,} tokens does not fit the model's context of "
                f"{model.block_size:,}: lower evaluation.likelihood.window"
            )
        start = 0
        while start < len(group):
            batch = group[start : start + _windows_at_once(model, len(group[start].tokens))]
            yield from zip(batch, _score_batch(model, batch, score), strict=True)
            start += len(batch)


def _windows_at_once(model: Neural, longest: int) -> int:
    """Windows of at most `longest` tokens that go through the trunk together."""
    on_cpu = model.head.device.type == "cpu"
    return max(1, min(model.batch_size, CPU_TOKENS // longest)) if on_cpu else model.batch_size


def _score_batch(model: Neural, batch: list[Window], score: Score) -> list[Floats]:
    """What `score` makes of every target of a batch, by window."""
    import torch

    device = model.head.device
    fed = torch.tensor([len(window.tokens) for window in batch])[:, None]  # (B, 1)
    lengths = [len(window.targets) for window in batch]
    tokens = torch.zeros(len(batch), int(fed.max()), dtype=torch.int64)  # (B, T)
    for row, window in zip(tokens, batch, strict=True):
        row[: len(window.tokens)] = torch.from_numpy(window.tokens)
    place = torch.arange(tokens.shape[1])
    scored = (place < fed) & (place >= fed - torch.tensor(lengths)[:, None])  # (B, T)
    targets = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(device)
    with torch.inference_mode():
        hidden = model.hidden(tokens.to(device))[scored.to(device)]  # (targets, C)
        places = [slice(start, start + HEAD_ROWS) for start in range(0, len(targets), HEAD_ROWS)]
        logits = hidden.new_empty(min(HEAD_ROWS, len(targets)), len(model.head))  # the same memory for all
        scores = []
        for rows in places:
            part = torch.mm(hidden[rows], model.head.T, out=logits[: len(hidden[rows])])
            scores.append(score(part.float(), targets[rows]))
        values: Floats = torch.cat(scores).cpu().double().numpy()
    return np.split(values, np.cumsum(lengths)[:-1])


@dataclass(frozen=True)
class Totals:
    """The sums of every document of a split, in its order: what every figure is made from."""

    ids: list[str]  # hex
    bytes: Counts  # (documents,) of UTF-8 text
    tokens: Counts  # (documents,) of the split's tokenizer, each scored once
    own_tokens: Counts | None  # (documents,) of the model's tokenizer
    nats: Floats  # (documents,)
    words: Counts | None = None  # (documents,) runs of what is not white space; None in files of before
    views: Mapping[str, Floats] = field(default_factory=dict)  # (documents,) nats in the other views
    positions: Positions | None = None  # not kept in the file


def evaluate(
    model: LanguageModel,
    split: TokenFile,
    encoding: "tiktoken.Encoding",
    likelihood: Likelihood,
    *,
    views: Iterable[View] = (),
    progress: Progress = silent,
) -> Totals:
    """Measure a model on a split.

    Args:
        model: anything that scores documents.
        split: the val split.
        encoding: that made the split.
        likelihood: the window, and the sizes of the other views.
        views: the other views to take of a neural model.
        progress: told what is done.

    Raises:
        BadData: the split has no token to score, or is not the encoding's.
        NotFinite: the model gave a document no finite number of nats.
    """
    tokens = np.diff(split.offsets) - 1
    if not tokens.sum():
        raise BadData(f"{split.path} has no token to score: add text, or raise tokenization.val_fraction")
    words = [len(document_text(split, encoding, index).decode().split()) for index in range(len(tokens))]
    found = model.score(split, likelihood.window, progress)
    _check_finite(found.nats, split)
    others = _views(model, split, views, likelihood, progress) if isinstance(model, Neural) else {}
    return Totals(
        split.document_ids,
        split.byte_lengths,
        tokens,
        found.own_tokens,
        found.nats,
        np.array(words, np.int64),
        others,
        found.positions,
    )


def _views(
    model: Neural, split: TokenFile, views: Iterable[View], likelihood: Likelihood, progress: Progress
) -> dict[str, Floats]:
    """Nats of every document in the other views."""
    found: dict[str, Floats] = {}
    for view in views:
        found[view] = model.view(split, view, likelihood, progress).nats
        _check_finite(found[view], split)
    return found


def _check_finite(nats: Floats, split: TokenFile) -> None:
    for document in np.flatnonzero(~np.isfinite(nats))[:1]:
        raise NotFinite(
            f"document {split.document_ids[document]} of {split.path} got {nats[document]} nats: the "
            "model's weights or arithmetic are broken; train again or check the weights' source"
        )


def document_text(split: TokenFile, encoding: "tiktoken.Encoding", document: int) -> bytes:
    """Spell a document of a split.

    Raises:
        BadData: the encoding is not the one that made the split.
    """
    text = encoding.decode_bytes(split.document(document).tolist())
    if len(text) != split.byte_lengths[document]:
        raise BadData(
            f"document {split.document_ids[document]} of {split.path} has {len(text):,} bytes where "
            f"{split.byte_lengths[document]:,} were tokenized: run `dvc repro -f download tokenization`"
        )
    return text


def summarize(
    name: str,
    model: LanguageModel,
    totals: Totals,
    split: TokenFile,
    likelihood: Likelihood,
) -> dict[str, Any]:
    """Make the report of one model: sums first, then one division; 95 % intervals over documents.

    Loss and perplexity are per token of the split's tokenizer (GPT-2's), whatever the model's own, so that
    models with different tokenizers compare; bits per byte needs no tokenizer at all. Word perplexity is
    the harness's: exp of the nats of everything, white space too, over the number of words.
    """
    own_tokens = None if totals.own_tokens is None else int(totals.own_tokens.sum())
    words = None if totals.words is None else int(totals.words.sum())
    report = {
        "model": {"name": name, **model.facts},
        "validation": {
            "sha256": sha256_file(split.path),
            "documents": len(totals.ids),
            "tokens": int(totals.tokens.sum()),
            "bytes": int(totals.bytes.sum()),
            "words": words,
        },
        "window": likelihood.window,
        **figures(totals.nats, totals, likelihood),
        "own_tokens": own_tokens,
        "loss_per_own_token": float(totals.nats.sum()) / own_tokens if own_tokens else None,
    }
    if isinstance(model, Neural):
        report["views"] = {
            view: dict(
                zip(("context", "stride"), model.view_sizes(cast(View, view), likelihood), strict=True)
            )
            | figures(nats, totals, likelihood)
            for view, nats in totals.views.items()
        }
    if totals.positions is not None:
        report["by_position"] = by_position(totals.positions, likelihood)
    return report


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The few figures that have a column in `dvc exp show` and a row in `dvc metrics diff`."""
    found: dict[str, float] = {
        name: report[name]["value"] for name in ("loss", "perplexity", "bits_per_byte")
    }
    if cloze := report["tasks"].get("cloze", {}).get("accuracy"):
        found["cloze_accuracy"] = cloze["value"]
    return found


def figures(nats: Floats, totals: Totals, likelihood: Likelihood) -> dict[str, Any]:
    """Loss, perplexity, word perplexity and bits per byte of a view, each with its interval."""
    scored = totals.tokens > 0

    def per(unit: npt.NDArray[Any]) -> Interval:
        return _ratio(nats[scored], unit[scored], likelihood)

    loss = per(totals.tokens)
    bits = per(totals.bytes).map(lambda nats: bits_per_byte(nats, 1))
    found = {
        "loss": asdict(loss),
        "perplexity": asdict(loss.map(perplexity)),
        "bits_per_byte": asdict(bits),
        "word_perplexity": None,
    }
    if totals.words is not None and totals.words[scored].all():  # a document of white space has none
        found["word_perplexity"] = asdict(per(totals.words).map(perplexity))
    return found


def by_position(positions: Positions, likelihood: Likelihood) -> list[dict[str, Any]]:
    """Loss in nats per own token by place in the window, with intervals over documents."""
    rows = []
    for bucket, tokens in enumerate(positions.tokens.T):
        held = tokens > 0
        if not held.any():
            continue
        rows.append(
            {
                "first": 2 ** (bucket - 1) + 1 if bucket else 1,
                "last": 2**bucket,
                "tokens": int(tokens.sum()),
                "loss": asdict(_ratio(positions.nats[held, bucket], tokens[held], likelihood)),
            }
        )
    return rows


def _ratio(nats: Floats, units: npt.NDArray[Any], likelihood: Likelihood) -> Interval:
    return ratio_bootstrap(
        nats,
        units.astype(float),
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )


def write_totals(path: Path, totals: Totals) -> None:
    """Keep the sums of every document as parquet; the same sums give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    def counts(column: Counts | None) -> Any:
        if column is None:
            return pyarrow.nulls(len(totals.ids), pyarrow.int64())
        return pyarrow.array(column, pyarrow.int64())

    columns = {
        "id": pyarrow.array(totals.ids, pyarrow.string()),
        "bytes": counts(totals.bytes),
        "tokens": counts(totals.tokens),
        "own_tokens": counts(totals.own_tokens),
        "words": counts(totals.words),
        "nats": pyarrow.array(totals.nats, pyarrow.float64()),
    }
    for view, nats in totals.views.items():
        columns[f"{_VIEW}{view}"] = pyarrow.array(nats, pyarrow.float64())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_totals(path: Path) -> Totals:
    """Read the sums of every document back.

    Raises:
        MissingInput: there is no such file.
        BadData: it is not what `write_totals` writes.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        columns: dict[str, Any] = {
            name: None if table[name].null_count else table[name].to_numpy()
            for name in table.column_names
            if name != "id"
        }
        views = {name.removeprefix(_VIEW): columns[name] for name in columns if name.startswith(_VIEW)}
        known = ("bytes", "tokens", "own_tokens", "nats")
        totals = Totals(
            table["id"].to_pylist(),
            words=columns.get("words"),  # files of before have none
            views=views,
            **{name: columns[name] for name in known},
        )
        _check_columns(totals)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it") from error
    except (pyarrow.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadData(f"{path} is damaged: delete it and run `dvc repro`") from error
    return totals


def _check_columns(totals: Totals) -> None:
    """See that sums are of the types that `write_totals` writes, and finite."""
    counts = [totals.bytes, totals.tokens]
    counts += [column for column in (totals.own_tokens, totals.words) if column is not None]
    if any(column.dtype != np.int64 or (column < 0).any() for column in counts):
        raise ValueError("a column of counts has none")
    for column in (totals.nats, *totals.views.values()):
        if column.dtype != np.float64 or not np.isfinite(column).all():
            raise ValueError("a column of nats has none")
    if not all(isinstance(name, str) for name in totals.ids):
        raise ValueError("an id is no word")
