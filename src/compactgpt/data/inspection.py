"""Great Expectations on the token files: are they what was written, and is val new to train?

Three tables of one row are checked, each counted while the files are read in pieces:

    train, val     token ids below the vocabulary, an end-of-text after every document and nowhere else, the
                   documents of data/documents in their order and of their length, a fair share, and enough
    repetition     documents that repeat others, and documents of val that are in train (duplicates.py)

Documents of val that are not clean are listed with their twins, so that evaluation can compare flagged with
clean documents. The result does not depend on the number of workers.
"""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData
from compactgpt.common.storage import sha256_file, verified_manifest
from compactgpt.config import Inspection
from compactgpt.data.documents import RowGroup, read_names, row_groups
from compactgpt.data.duplicates import Digest, Scan, id_array
from compactgpt.data.token_files import TokenFile, open_tokens
from compactgpt.data.validation import Table, at_least, at_most, check_expectations

_TOKENS_AT_ONCE = 2**24
_DOCUMENTS_AT_ONCE = 2**20
_GROUPS_PER_WORKER = 8  # fewer row groups are not worth a process
_SPLITS = ("train", "val")

Describe = Callable[[int], dict[str, str]]  # number of a document -> its id and source


def inspect(
    documents: Path,
    tokens: Path,
    docs: Path,
    params: Inspection,
    *,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check the token files, and find documents that repeat others.

    Args:
        documents: folder of the document shards that the token files were made from.
        tokens: folder of token files.
        docs: folder for Data Docs, replaced. They carry the time, so no DVC output may depend on them.
        params: bounds, and what counts as a repetition.
        num_workers: processes; the result does not depend on it.
        progress: called with the number of documents read.

    Returns:
        The report: `success`, facts of each split, the number of `documents`, their `repetition` in numbers,
        `flagged` (documents of val: id, source, kind, twin, score), `repeated` (the nearest twins within
        train), and the results of `check_expectations`.

    Raises:
        MissingInput, BadData: an input is missing or damaged.
    """
    corpus, made = verified_manifest(documents), verified_manifest(tokens)
    splits = {name: open_tokens(tokens / f"{name}.tokens") for name in _SPLITS}
    groups = row_groups(documents)
    docs.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=docs.parent) as scratch:  # on the disk that has the data
        scan = Scan(params, Path(scratch))
        order = _scan(scan, groups, splits, corpus["documents"], num_workers, progress)
        found = Repetition(params, scan)
    tables = [_split_table(splits[name], name, order, made["val_fraction"], params) for name in _SPLITS]
    results = check_expectations("inspection", [*tables, _repetition_table(found, params)], docs)
    describe = _read_descriptions(groups, found.named())
    return {
        "success": all(result["success"] for result in results),
        **{name: _facts(split) for name, split in splits.items()},
        "documents": found.documents,
        "repetition": found.numbers(),
        "flagged": found.flagged(describe),
        "repeated": found.repeated(describe),
        "expectations": results,
    }


def _scan(
    scan: Scan,
    groups: list[RowGroup],
    splits: dict[str, TokenFile],
    documents: int,
    num_workers: int,
    progress: Progress,
) -> "Order":
    """Read the documents once: digest them, and compare the token files with them."""
    order, held_out = Order(splits), id_array(row.tobytes() for row in splits["val"].ids)
    workers = min(num_workers, max(1, len(groups) // _GROUPS_PER_WORKER))
    for digest in scan.read(groups, held_out, documents, workers, progress):
        order.add(digest)
    return order


def passed(report: dict[str, Any]) -> dict[str, Any]:
    """Return what training depends on: which token files passed, and not by which bounds."""
    return {name: {"passed": report["success"], "sha256": report[name]["sha256"]} for name in _SPLITS}


def _facts(split: TokenFile) -> dict[str, Any]:
    return {
        "documents": split.header.documents,
        "tokens": split.header.tokens,
        "bytes": int(split.byte_lengths.sum()),
        "sha256": sha256_file(split.path),
    }


# --- the token files


class Order:
    """Compares the splits with the corpus: the same ids and lengths, in the same order, and no more."""

    def __init__(self, splits: dict[str, TokenFile]) -> None:
        self._splits = splits
        self.documents = 0
        self._next, self._different = dict.fromkeys(_SPLITS, 0), dict.fromkeys(_SPLITS, 0)

    def add(self, digest: Digest) -> None:
        """Compare the documents of one row group with the next ones of each split."""
        self.documents += len(digest.ids)
        for name, here in (("train", ~digest.in_val), ("val", digest.in_val)):
            split, start = self._splits[name], self._next[name]
            ids, lengths = digest.ids[here], digest.byte_lengths[here]
            written = id_array(row.tobytes() for row in split.ids[start : start + len(ids)])
            same = ids[: len(written)] == written
            same &= lengths[: len(written)] == split.byte_lengths[start : start + len(ids)]
            self._different[name] += len(ids) - int(same.sum())
            self._next[name] += len(ids)

    def different(self, name: str) -> int:
        """Count the documents of a split that differ from the corpus at their position."""
        return self._different[name] + max(0, self._splits[name].header.documents - self._next[name])


def _split_table(split: TokenFile, name: str, order: Order, val_fraction: float, params: Inspection) -> Table:
    share = val_fraction if name == "val" else 1 - val_fraction
    expected = share * order.documents
    deviation = math.sqrt(max(expected * (1 - share), 1e-9))  # of a binomial count
    row = {
        "id": name,
        "source": split.path.name,
        "documents": split.header.documents,
        "highest_token": _highest_token(split),
        **_ends(split),
        "documents_that_differ": order.different(name),
        "share_deviation": abs(split.header.documents - expected) / deviation,
    }
    least = params.min_val_documents if name == "val" else 1
    fair = f"{name}: standard deviations of its size from a fair split"
    suite = [
        at_least("documents", least, f"{name}: documents"),
        at_most("highest_token", split.header.vocab_size - 1, f"{name}: highest token id"),
        at_most("documents_without_end", 0, f"{name}: documents without end-of-text"),
        at_most("ends_inside", 0, f"{name}: end-of-text tokens inside documents"),
        at_most("documents_that_differ", 0, f"{name}: documents that differ from data/documents"),
        at_most("share_deviation", params.max_val_deviation, fair),
    ]
    return Table(name, [row], suite)


def _highest_token(split: TokenFile) -> int:
    """Find the highest token id, reading in pieces."""
    starts = range(0, len(split.tokens), _TOKENS_AT_ONCE)
    return max((int(split.tokens[start : start + _TOKENS_AT_ONCE].max()) for start in starts), default=0)


def _ends(split: TokenFile) -> dict[str, int]:
    """Count documents that no end-of-text closes, and end-of-text tokens inside documents."""
    tokens, eot = split.tokens, split.header.eot_token
    total = sum(
        int(np.count_nonzero(tokens[start : start + _TOKENS_AT_ONCE] == eot))
        for start in range(0, len(tokens), _TOKENS_AT_ONCE)
    )
    closed = 0
    for start in range(0, split.header.documents, _DOCUMENTS_AT_ONCE):
        last = split.offsets[start + 1 : start + 1 + _DOCUMENTS_AT_ONCE] - 1
        closed += int(np.count_nonzero(tokens[last] == eot))
    return {"documents_without_end": split.header.documents - closed, "ends_inside": total - closed}


# --- repetition


class Repetition:
    """The findings of a scan, as the report has them."""

    def __init__(self, params: Inspection, scan: Scan) -> None:
        same, near, overlap = scan.same_words(), scan.near_duplicates(), scan.overlap()
        self.documents = scan.documents
        self._params, self._in_val = params, scan.in_val
        self._overlap, self._same, self._near = overlap, same, near
        self._same_across = (same >= 0) & (scan.in_val != scan.in_val[np.maximum(same, 0)])
        self._share = overlap.seen / np.maximum(overlap.runs, 1)
        in_train = (self._same_across | (near.twin_across >= 0))[overlap.documents]
        leaked = in_train | (self._share >= params.leaked_overlap)
        self.leaked_share = float(leaked.sum() / max(1, len(leaked)))  # of val's documents
        self.repeated_share = float(((same >= 0) | (near.twin >= 0)).sum() / max(1, scan.documents))
        self._pairs, self._flags = self._pairs_in_train(), self._flagged()

    def _pairs_in_train(self) -> list[tuple[float, int, int, str]]:
        """List the nearest pairs within train, each once, as far as the report names them."""
        pairs = {}
        for kind, twins in (("near duplicate", self._near.twin), ("same words", self._same)):
            for number in np.flatnonzero((twins >= 0) & ~self._in_val).tolist():
                twin = int(twins[number])
                if not self._in_val[twin]:
                    score = 1.0 if kind == "same words" else float(self._near.similarity[number])
                    pairs[min(number, twin), max(number, twin)] = (score, kind)
        ordered = sorted((-score, *pair, kind) for pair, (score, kind) in pairs.items())
        return [(-score, a, b, kind) for score, a, b, kind in ordered[: self._params.max_listed]]

    def _flagged(self) -> list[tuple[int, str, int, float]]:
        """List (document of val, kind, twin, score), by document."""
        flags: list[tuple[int, str, int, float]] = []
        held_out: npt.NDArray[np.int64] = np.flatnonzero(self._in_val)
        for number in held_out.tolist():
            same = int(self._same[number])
            if same >= 0:
                flags.append((number, "same words", same, 1.0))
            across = int(self._near.twin_across[number])
            twin = across if across >= 0 else int(self._near.twin[number])
            if twin >= 0:
                best = self._near.similarity_across if across >= 0 else self._near.similarity
                flags.append((number, "near duplicate", twin, float(best[number])))
        for row, number in enumerate(self._overlap.documents.tolist()):
            if self._overlap.seen[row] and self._share[row] > self._params.flagged_overlap:
                flags.append((number, "overlap", int(self._overlap.twins[row]), float(self._share[row])))
        return sorted(flags)

    def numbers(self) -> dict[str, Any]:
        """Count documents that have a twin, by kind, and where the twin is."""
        overlap, same, near = self._overlap, self._same, self._near
        counts = {}
        for kind, twins, across in (
            ("same_words", same, self._same_across),
            ("near_duplicates", near.twin, near.twin_across >= 0),
        ):
            counts[kind] = {
                "documents": int((twins >= 0).sum()),
                "train": int(((twins >= 0) & ~self._in_val).sum()),
                "val": int(((twins >= 0) & self._in_val).sum()),
                "val_with_twin_in_train": int((across & self._in_val).sum()),
            }
        return {
            **counts,
            "repeated_share": self.repeated_share,
            "leaked_share": self.leaked_share,
            "overlap": {
                "words": self._params.overlap_words,
                "runs": int(overlap.runs.sum()),
                "runs_in_train": int(overlap.seen.sum()),
                "val_documents": len(overlap.runs),
                "val_documents_with_any": int((overlap.seen > 0).sum()),
                "val_documents_leaked": int((self._share >= self._params.leaked_overlap).sum()),
            },
        }

    def named(self) -> set[int]:
        """Return the numbers of all documents that the report names."""
        names = {number for _, *pair, _ in self._pairs for number in pair}
        return names | {number for document, _, twin, _ in self._flags for number in (document, twin)}

    def flagged(self, describe: Describe) -> list[dict[str, Any]]:
        """List every document of val that repeats another, or has runs of words that are in train."""
        return [_entry(describe, *flag) for flag in self._flags]

    def repeated(self, describe: Describe) -> list[dict[str, Any]]:
        """List the nearest twins within train."""
        return [_entry(describe, number, kind, twin, score) for score, number, twin, kind in self._pairs]


def _entry(describe: Describe, number: int, kind: str, twin: int, score: float) -> dict[str, Any]:
    return {**describe(number), "kind": kind, "twin": describe(twin), "score": round(score, 6)}


def _repetition_table(found: Repetition, params: Inspection) -> Table:
    row = {
        "id": "corpus",
        "source": "all documents",
        "repeated_share": found.repeated_share,
        "leaked_share": found.leaked_share,
    }
    suite = [
        at_most("repeated_share", params.max_repeated_share, "share of documents that have a twin"),
        at_most("leaked_share", params.max_leaked_share, "share of val's documents that are in train"),
    ]
    return Table("repetition", [row], suite)


def _read_descriptions(groups: list[RowGroup], numbers: set[int]) -> Describe:
    """Look up id and source of some documents, in one more pass over their row groups."""
    found: dict[int, dict[str, str]] = {}
    wanted, start = sorted(numbers), 0
    for group in groups:
        if not wanted:
            break
        names = read_names(group)
        while wanted and wanted[0] < start + len(names):
            document_id, source = names[wanted[0] - start]
            found[wanted.pop(0)] = {"id": document_id, "source": source}
        start += len(names)
    if wanted:
        raise BadData("the documents changed while they were inspected: run the same command again")
    return found.__getitem__
