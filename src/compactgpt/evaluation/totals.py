"""Compute metrics from per-document losses, and store the losses as Parquet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import atomic_file
from compactgpt.evaluation.metrics import Interval, bits_per_byte, perplexity, ratio_interval

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Prefix of the columns with the losses of a view, such as `nats_strided` for the view `strided`. A view is
# a way to cut documents into windows.
_VIEW = "nats_"


@dataclass(frozen=True)
class Positions:
    """The losses of each document, grouped by the position of the tokens in their windows.

    A group of positions is a bucket. The buckets are the positions 1, 2, 3 to 4, 5 to 8, and so on.
    """

    nats: Floats  # (documents, buckets), sum of the losses of the tokens in each bucket
    tokens: Counts  # (documents, buckets), number of tokens in each bucket, in the model's tokenizer


@dataclass(frozen=True)
class Totals:
    """The losses and sizes of all documents, in the order of the documents in the split."""

    ids: list[str]  # the id of each document, in hexadecimal digits
    bytes: Counts  # (documents,), bytes of UTF-8 text
    tokens: Counts  # (documents,), scored tokens, in the token file's tokenizer
    own_tokens: Counts | None  # (documents,), scored tokens, in the model's tokenizer; None for compressors
    nats: Floats  # (documents,), negative log-likelihood of each document
    words: Counts | None = None  # (documents,), words between white space; None in files of earlier versions
    # Name of a view (a way to cut documents into windows) -> each document's loss, (documents,)
    views: Mapping[str, Floats] = field(default_factory=dict)
    positions: Positions | None = None  # only in memory: `write_totals` does not write the positions


def figures(nats: Floats, totals: Totals, chosen: Flags | None = None) -> dict[str, Any]:
    """Return loss, perplexity, word perplexity and bits per byte, each with its 95 % interval.

    `nats`, (documents,), is the loss of each document, summed over its tokens.
    `chosen`, (documents,), selects documents; None selects all.
    A perplexity that is too large for a float is None.
    """
    scored = totals.tokens > 0
    if chosen is not None:
        scored &= chosen

    def nats_per(unit: npt.NDArray[Any]) -> Interval:
        return _ratio(nats[scored], unit[scored])

    loss = nats_per(totals.tokens)
    found = {
        "loss": asdict(loss),
        "perplexity": loss.map(perplexity).as_report(),
        "bits_per_byte": asdict(nats_per(totals.bytes).map(lambda nats: bits_per_byte(nats, 1))),
        "word_perplexity": None,
    }
    # Word perplexity stays None if a document has only white space, and so no words.
    if totals.words is not None and totals.words[scored].all():
        found["word_perplexity"] = nats_per(totals.words).map(perplexity).as_report()
    return found


def by_position(positions: Positions) -> list[dict[str, Any]]:
    """Return the report's row for each bucket of `Positions` that has tokens.

    A row's loss is in nats per token of the model's tokenizer.
    """
    rows = []
    for bucket, tokens in enumerate(positions.tokens.T):  # (documents,)
        reached = tokens > 0
        if reached.any():
            loss = _ratio(positions.nats[reached, bucket], tokens[reached])
            first = 2 ** (bucket - 1) + 1 if bucket else 1
            row = {"first": first, "last": 2**bucket, "tokens": int(tokens.sum()), "loss": asdict(loss)}
            rows.append(row)
    return rows


def _ratio(nats: Floats, units: npt.NDArray[Any]) -> Interval:
    found = ratio_interval(nats, units.astype(float))
    return replace(found, low=max(0.0, found.low))  # a loss is never below 0


def write_totals(path: Path, totals: Totals) -> None:
    """Write the per-document losses and counts as Parquet: equal totals give equal files."""
    import pyarrow
    import pyarrow.parquet

    columns = {"id": pyarrow.array(totals.ids, pyarrow.string())}
    for name in ("bytes", "tokens", "own_tokens", "words"):
        counts = getattr(totals, name)
        absent = pyarrow.nulls(len(totals.ids), pyarrow.int64())
        columns[name] = absent if counts is None else pyarrow.array(counts, pyarrow.int64())
    for name, nats in [("nats", totals.nats), *((_VIEW + view, nats) for view, nats in totals.views.items())]:
        columns[name] = pyarrow.array(nats, pyarrow.float64())
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="zstd")


def read_totals(path: Path) -> Totals:
    """Read a file that `write_totals` wrote.

    Raises MissingInput if the file does not exist, and BadData if it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        ids = table["id"].to_pylist()
        # A missing count, such as `own_tokens` of a compressor, is a column of nulls.
        columns: dict[str, Any] = {
            name: None if table[name].null_count else table[name].to_numpy()
            for name in table.column_names
            if name != "id"
        }
        views = {name.removeprefix(_VIEW): columns.pop(name) for name in [*columns] if name.startswith(_VIEW)}
        return Totals(ids, views=views, **columns)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` in the repository folder") from error
    except (pyarrow.ArrowException, OSError, KeyError, TypeError) as error:
        raise BadData(f"{path} is damaged: delete it and run `dvc repro`") from error
