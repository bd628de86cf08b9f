"""Any model + the val split -> nats, tokens and bytes of every document, and the report made from them.

One path for every model: a `LanguageModel` turns a split into nats by document; `evaluate` checks them
and puts them beside the documents; `summarize` divides the sums once. How a model gets its nats is its
own affair, but all see the same text: `data.evaluation_windows`, fed after the end-of-text token or the
token before the window; end-of-text is never scored, every other token exactly once.

A neural model is a `Neural`: hidden states and the rows that turn them into logits. `target_nats` scores
its windows, with at most HEAD_ROWS rows of logits in memory, whatever the batch. torch is imported when
a neural model runs, so that a compressor need not wait for it.

B windows, T tokens of the longest, C channels, V rows of the vocabulary.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from compactgpt.config import Likelihood
from compactgpt.data import TokenFile, Window, evaluation_windows
from compactgpt.errors import BadConfig, BadData, MissingInput, NotFinite
from compactgpt.metrics import bits_per_byte, perplexity, ratio_bootstrap
from compactgpt.progress import Progress, silent
from compactgpt.storage import sha256_file, write_bytes

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

IN_WINDOW = "the window of the document"  # what a model saw before a target, as its report says it
HEAD_ROWS = 512  # hidden states that meet the vocabulary at once: 100 MB of logits at 50,257 in float32
SORTED_WINDOWS = 4096  # windows that are ordered by length together, so that few places are padding


@dataclass(frozen=True)
class Nats:
    """What a model tells of a split, in the split's order."""

    nats: Floats  # (documents,) summed over the document
    own_tokens: Counts | None  # (documents,) in the model's own tokens; None where it has none


class LanguageModel(Protocol):
    """Anything that gives every document of a split a number of nats."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says of the model: kind, num_params, context and whatever tells it apart."""

    def score(self, split: TokenFile, window: int, progress: Progress, /) -> Nats:
        """Sum the nats of every document; a model with a context cuts documents at `window` tokens."""


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

    def score(self, split: TokenFile, window: int, progress: Progress) -> Nats:
        """Sum the nats of every document."""
        documents = split.header.documents
        nats, own_tokens = np.zeros(documents), np.zeros(documents, np.int64)
        lengths = np.diff(split.offsets) - 1
        total, started = int(np.sum(-(-lengths // window))), time.monotonic()
        for done, (scored, values) in enumerate(target_nats(self, self.windows(split, window)), 1):
            nats[scored.document] += values.sum()
            own_tokens[scored.document] += len(values)
            if done % self.batch_size == 0:
                rate = own_tokens.sum() / (time.monotonic() - started)
                progress(done, total, {"tokens/s": f"{rate:,.0f}"})
        progress(total, total)
        return Nats(nats, own_tokens)


def target_nats(model: Neural, windows: Iterable[Window]) -> Iterator[tuple[Window, Floats]]:
    """Score windows, long ones first within each SORTED_WINDOWS of them.

    Yields:
        Each window once, with the nats of each of its targets. (T,)

    Raises:
        BadConfig: a window is longer than the model's context.
    """
    remaining = iter(windows)
    while group := list(islice(remaining, SORTED_WINDOWS)):
        group.sort(key=lambda window: -len(window.targets))
        if len(group[0].tokens) > model.block_size:
            raise BadConfig(
                f"a window of {len(group[0].tokens):,} tokens does not fit the model's context of "
                f"{model.block_size:,}: lower evaluation.likelihood.window"
            )
        for start in range(0, len(group), model.batch_size):
            batch = group[start : start + model.batch_size]
            yield from zip(batch, _batch_nats(model, batch), strict=True)


def _batch_nats(model: Neural, batch: list[Window]) -> list[Floats]:
    """Nats of every target of a batch, by window."""
    import torch
    from torch.nn.functional import cross_entropy

    device = model.head.device
    lengths = [len(window.targets) for window in batch]
    tokens = torch.zeros(len(batch), max(lengths), dtype=torch.int64)  # (B, T)
    for row, window in zip(tokens, batch, strict=True):
        row[: len(window.tokens)] = torch.from_numpy(window.tokens)
    scored = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T)
    targets = torch.from_numpy(np.concatenate([window.targets for window in batch])).to(device)
    with torch.inference_mode():
        hidden = model.hidden(tokens.to(device))[scored.to(device)]  # (targets, C)
        places = [slice(start, start + HEAD_ROWS) for start in range(0, len(targets), HEAD_ROWS)]
        nats = [
            cross_entropy((hidden[rows] @ model.head.T).float(), targets[rows], reduction="none")
            for rows in places
        ]
        values: Floats = torch.cat(nats).cpu().double().numpy()
    return np.split(values, np.cumsum(lengths)[:-1])


@dataclass(frozen=True)
class Totals:
    """The sums of every document of a split, in its order: what every figure is made from."""

    ids: list[str]  # hex
    bytes: Counts  # (documents,) of UTF-8 text
    tokens: Counts  # (documents,) of the split's tokenizer, each scored once
    own_tokens: Counts | None  # (documents,) of the model's tokenizer
    nats: Floats  # (documents,)


def evaluate(
    model: LanguageModel, split: TokenFile, likelihood: Likelihood, progress: Progress = silent
) -> Totals:
    """Measure a model on a split.

    Args:
        model: anything that scores documents.
        split: the val split.
        likelihood: the window.
        progress: told what is done.

    Raises:
        BadData: the split has no token to score.
        NotFinite: the model gave a document no finite number of nats.
    """
    tokens = np.diff(split.offsets) - 1
    if not tokens.sum():
        raise BadData(f"{split.path} has no token to score: add text, or raise tokenization.val_fraction")
    found = model.score(split, likelihood.window, progress)
    for document in np.flatnonzero(~np.isfinite(found.nats))[:1]:
        raise NotFinite(
            f"document {split.document_ids[document]} of {split.path} got {found.nats[document]} nats: the "
            "model's weights or arithmetic are broken; train again or check the weights' source"
        )
    return Totals(split.document_ids, split.byte_lengths, tokens, found.own_tokens, found.nats)


def summarize(
    name: str, facts: Mapping[str, Any], totals: Totals, split: TokenFile, likelihood: Likelihood
) -> dict[str, Any]:
    """Make the report of one model: sums first, then one division; 95 % intervals over documents.

    Loss and perplexity are per token of the split's tokenizer (GPT-2's), whatever the model's own, so that
    models with different tokenizers compare; bits per byte needs no tokenizer at all.
    """
    scored = totals.tokens > 0
    bootstrap = partial(
        ratio_bootstrap,
        totals.nats[scored],
        resamples=likelihood.bootstrap_resamples,
        seed=likelihood.bootstrap_seed,
    )
    loss = bootstrap(totals.tokens[scored].astype(float))
    bits = bootstrap(totals.bytes[scored].astype(float)).map(lambda nats: bits_per_byte(nats, 1))
    own_tokens = None if totals.own_tokens is None else int(totals.own_tokens.sum())
    return {
        "model": {"name": name, **facts},
        "validation": {
            "sha256": sha256_file(split.path),
            "documents": len(totals.ids),
            "tokens": int(totals.tokens.sum()),
            "bytes": int(totals.bytes.sum()),
        },
        "window": likelihood.window,
        "loss": asdict(loss),
        "perplexity": asdict(loss.map(perplexity)),
        "bits_per_byte": asdict(bits),
        "own_tokens": own_tokens,
        "loss_per_own_token": float(totals.nats.sum()) / own_tokens if own_tokens else None,
    }


def write_totals(path: Path, totals: Totals) -> None:
    """Keep the sums of every document as parquet; the same sums give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    own_tokens = totals.own_tokens
    table = pyarrow.table(
        {
            "id": pyarrow.array(totals.ids, pyarrow.string()),
            "bytes": pyarrow.array(totals.bytes, pyarrow.int64()),
            "tokens": pyarrow.array(totals.tokens, pyarrow.int64()),
            "own_tokens": pyarrow.nulls(len(totals.ids), pyarrow.int64())
            if own_tokens is None
            else pyarrow.array(own_tokens, pyarrow.int64()),
            "nats": pyarrow.array(totals.nats, pyarrow.float64()),
        }
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
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
        columns = {name: table[name].to_numpy() for name in ("bytes", "tokens", "nats")}
        own = table["own_tokens"]
        own_tokens = None if own.null_count else own.to_numpy()
        return Totals(table["id"].to_pylist(), own_tokens=own_tokens, **columns)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it") from error
    except (pyarrow.ArrowInvalid, KeyError) as error:
        raise BadData(f"{path} is damaged: delete it and run `dvc repro`") from error
