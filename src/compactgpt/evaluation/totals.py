"""Per-document losses: the metrics that are computed from them, and their Parquet file."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import write_bytes
from compactgpt.evaluation.metrics import Interval, bits_per_byte, perplexity, ratio_interval

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_COUNTS = ("bytes", "tokens", "own_tokens", "words")
_VIEW = "nats_"  # a view's column is called nats_<view>


@dataclass(frozen=True)
class Positions:
    """Per-document losses by position in the window, in buckets.

    Bucket 0 is the first target of a window. Bucket b has the targets 2^(b-1) + 1 to 2^b.
    """

    nats: Floats  # (documents, buckets), total of each bucket
    tokens: Counts  # (documents, buckets), in the model's own tokens


@dataclass(frozen=True)
class Totals:
    """The per-document losses and counts, in the split's order, from which all metrics are computed."""

    ids: list[str]  # hex
    bytes: Counts  # (documents,), bytes of UTF-8 text
    tokens: Counts  # (documents,), tokens of the split's tokenizer, each scored once
    own_tokens: Counts | None  # (documents,), tokens of the model's tokenizer
    nats: Floats  # (documents,), negative log-likelihood
    words: Counts | None = None  # (documents,), words between white space; None in files of earlier versions
    views: Mapping[str, Floats] = field(default_factory=dict)  # nats in each other view, (documents,)
    positions: Positions | None = None  # `write_totals` does not write it


def figures(nats: Floats, totals: Totals, chosen: Flags | None = None) -> dict[str, Any]:
    """Return loss, perplexity, word perplexity and bits per byte of a view, each with its 95 % interval.

    `nats` are those of the view, `chosen` selects documents; both are (documents,). A perplexity is None if
    it is too large for a float: that of a diverged model, or that of the words of a text without spaces.
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
    if totals.words is not None and totals.words[scored].all():  # a document of only white space has no words
        found["word_perplexity"] = nats_per(totals.words).map(perplexity).as_report()
    return found


def by_position(positions: Positions) -> list[dict[str, Any]]:
    """Return the loss of each range of positions in the window, in nats per own token, with its interval."""
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
    """Write the per-document losses and counts as Parquet; equal values give equal bytes."""
    import pyarrow
    import pyarrow.parquet

    columns = {"id": pyarrow.array(totals.ids, pyarrow.string())}
    for name in _COUNTS:
        counts = getattr(totals, name)
        absent = pyarrow.nulls(len(totals.ids), pyarrow.int64())
        columns[name] = absent if counts is None else pyarrow.array(counts, pyarrow.int64())
    for name, nats in [("nats", totals.nats), *((_VIEW + view, nats) for view, nats in totals.views.items())]:
        columns[name] = pyarrow.array(nats, pyarrow.float64())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_totals(path: Path) -> Totals:
    """Read a file that `write_totals` wrote.

    Raises MissingInput if the file does not exist, and BadData if it is damaged or of another kind.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        ids = table["id"].to_pylist()
        columns = {name: _checked(name, table[name]) for name in table.column_names if name != "id"}
        if not all(isinstance(name, str) for name in ids):
            raise ValueError("an id is not a string")
        views = {name.removeprefix(_VIEW): columns.pop(name) for name in [*columns] if name.startswith(_VIEW)}
        return Totals(ids, views=views, **columns)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is missing: run `dvc repro` to make it") from error
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise BadData(f"{path} is damaged: delete it and run `dvc repro`") from error


def _checked(name: str, column: Any) -> Any:
    """Return a column as an array, or None for an optional one with nulls; raises ValueError if it is bad."""
    if name in ("own_tokens", "words") and column.null_count:
        return None
    values = column.to_numpy()
    if name in _COUNTS:
        is_valid = values.dtype == np.int64 and (values >= 0).all()
    else:
        is_valid = values.dtype == np.float64 and np.isfinite(values).all()
    if not is_valid:
        raise ValueError(f"column {name} has invalid values")
    return values
