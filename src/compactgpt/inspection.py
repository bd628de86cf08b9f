"""The token files, judged before they teach: are they what was written, and is val unknown to train?

Great Expectations judges one row for each split, summed while the files are read in pieces:

    tokens         ids below the vocabulary (`spare_ids` is the room left), an end-of-text after every
                   document and nowhere else, the documents of data/documents in their order and of their
                   length, a fair share in val, and enough (`spare_documents` over the least wanted)
    repetition     documents that others repeat, and documents of val that train knows (duplicates.py)

Documents of val that are not clean are listed with their twins, so that evaluation can show flagged
against clean. Nothing here depends on the number of workers.
"""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from compactgpt.config import Inspection
from compactgpt.data import TokenFile, open_tokens
from compactgpt.documents import RowGroup, read_names, row_groups
from compactgpt.duplicates import Digest, Scan, id_array
from compactgpt.errors import BadData
from compactgpt.progress import Progress, silent
from compactgpt.storage import sha256_file, verified_manifest
from compactgpt.validation import Table, at_least, at_most, judge

_TOKENS_AT_ONCE = 2**24
_DOCUMENTS_AT_ONCE = 2**20
_GROUPS_A_WORKER = 8  # fewer row groups are not worth a process


def inspect(
    documents: Path,
    tokens: Path,
    docs: Path,
    params: Inspection,
    *,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Judge the token files, and find what repeats itself in their documents.

    Args:
        documents: folder of the document shards that the token files were made from.
        tokens: folder of token files.
        docs: folder for Great Expectations' pages, replaced; they carry the time: nothing may depend on it.
        params: bounds, and what counts as a repetition.
        num_workers: processes; the result does not depend on it.
        progress: told the documents read.

    Returns:
        The report: `success`, the splits' hashes, `_Found.report`, what `validation.judge` says.

    Raises:
        MissingInput, BadData: an input is missing or damaged.
    """
    corpus, made = verified_manifest(documents), verified_manifest(tokens)
    splits = {name: open_tokens(tokens / f"{name}.tokens") for name in ("train", "val")}
    groups = row_groups(documents)
    with TemporaryDirectory(dir=_beside(docs)) as scratch:
        scan = Scan(params, Path(scratch))
        order = _read(scan, groups, splits, corpus["documents"], num_workers, progress)
        found = _Found(params, scan)
    rows = _rows(splits, order, found, made, params)
    outcomes = judge([Table("tokens", rows, _expectations(params))], docs)
    return {
        "success": all(outcome["success"] for outcome in outcomes),
        **{name: _facts(split) for name, split in splits.items()},
        **found.report(_describer(groups, found.named())),
        "expectations": outcomes,
    }


def _read(
    scan: Scan,
    groups: list[RowGroup],
    splits: dict[str, TokenFile],
    documents: int,
    num_workers: int,
    progress: Progress,
) -> "_Order":
    """Scan the documents, and see whether the splits follow them."""
    order, held_out = _Order(splits), id_array(_ids(splits["val"]))
    workers = min(num_workers, max(1, len(groups) // _GROUPS_A_WORKER))
    for digest in scan.read(groups, held_out, documents, workers, progress):
        order.follow(digest)
    return order


def passed(report: dict[str, Any]) -> dict[str, Any]:
    """What training depends on: which token files passed, and not by which bounds."""
    return {
        name: {"passed": report["success"], "sha256": report[name]["sha256"]} for name in ("train", "val")
    }


def _beside(docs: Path) -> Path:
    """The folder beside the pages, where scratch files may lie: on the disk that has the data."""
    docs.parent.mkdir(parents=True, exist_ok=True)
    return docs.parent


def _ids(split: TokenFile) -> list[bytes]:
    return [row.tobytes() for row in split.ids]


def _facts(split: TokenFile) -> dict[str, Any]:
    return {
        "documents": split.header.documents,
        "tokens": split.header.tokens,
        "bytes": int(split.byte_lengths.sum()),
        "sha256": sha256_file(split.path),
    }


# --- the token files


class _Order:
    """Follows the documents of the corpus through the splits: same ids and lengths, same order, none left."""

    def __init__(self, splits: dict[str, TokenFile]) -> None:
        self._splits, self._at = splits, {"train": 0, "val": 0}
        self.wrong = {"train": 0, "val": 0}

    def follow(self, digest: Digest) -> None:
        """Compare the documents of one row group with the next ones of each split."""
        for name, here in (("train", ~digest.in_val), ("val", digest.in_val)):
            split, start = self._splits[name], self._at[name]
            ids, lengths = digest.ids[here], digest.byte_lengths[here]
            theirs = id_array(row.tobytes() for row in split.ids[start : start + len(ids)])
            same = ids[: len(theirs)] == theirs
            same &= lengths[: len(theirs)] == split.byte_lengths[start : start + len(ids)]
            self.wrong[name] += len(ids) - int(same.sum())
            self._at[name] += len(ids)

    def missing(self, name: str) -> int:
        """Documents of a split that the corpus does not have at their place."""
        return self.wrong[name] + max(0, self._splits[name].header.documents - self._at[name])


def _rows(
    splits: dict[str, TokenFile],
    order: _Order,
    found: "_Found",
    made: dict[str, Any],
    params: Inspection,
) -> list[dict[str, Any]]:
    shares = {"val": made["val_fraction"], "train": 1 - made["val_fraction"]}
    rows = []
    for name, split in splits.items():
        expected = shares[name] * found.documents
        deviation = math.sqrt(max(expected * (1 - shares[name]), 1e-9))  # of a binomial count
        rows.append(
            {
                "id": name,
                "source": split.path.name,
                "spare_documents": split.header.documents
                - (params.min_val_documents if name == "val" else 1),
                "spare_ids": split.header.vocab_size - 1 - _highest(split),
                **_ends(split),
                "documents_that_differ": order.missing(name),
                "share_deviation": abs(split.header.documents - expected) / deviation,
                "repeated_share": found.repeated_share(),
                "leaked_share": found.leaked_share() if name == "val" else 0.0,
            }
        )
    return rows


def _highest(split: TokenFile) -> int:
    """The highest id of a token file, read in pieces."""
    tokens = split.tokens
    starts = range(0, len(tokens), _TOKENS_AT_ONCE)
    return max((int(tokens[start : start + _TOKENS_AT_ONCE].max()) for start in starts), default=0)


def _ends(split: TokenFile) -> dict[str, int]:
    """Documents that no end-of-text closes, and end-of-text tokens inside documents."""
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


def _expectations(params: Inspection) -> list[Any]:
    most = {
        "documents_without_end": 0,
        "ends_inside": 0,
        "documents_that_differ": 0,
        "share_deviation": params.max_val_deviation,
        "repeated_share": params.max_repeated_share,
        "leaked_share": params.max_leaked_share,
    }
    return [
        *(at_least(name, 0) for name in ("spare_documents", "spare_ids")),
        *(at_most(name, value) for name, value in most.items()),
    ]


# --- what repeats itself

Describe = Callable[[int], dict[str, str]]


class _Found:
    """What a scan found, in the words of the report."""

    def __init__(self, params: Inspection, scan: Scan) -> None:
        same, near, overlap = scan.same_words(), scan.near_duplicates(), scan.overlap()
        self.documents = scan.documents
        self._params, self._in_val = params, scan.in_val
        self._overlap, self._same, self._near = overlap, same, near
        # documents that are a twin of one of the other split
        self._known = np.zeros(scan.documents, np.bool_)
        self._known[(same >= 0) & (scan.in_val != scan.in_val[np.maximum(same, 0)])] = True
        self._known |= near.twin_across >= 0
        self._share = overlap.seen / np.maximum(overlap.runs, 1)
        self._listed = self._twins_in_train()

    def _twins_in_train(self) -> list[tuple[float, int, int, str]]:
        """The nearest pairs within train, each once, as far as the report names them."""
        pairs = {}
        for kind, twins in (("near duplicate", self._near.twin), ("same words", self._same)):
            for number in np.flatnonzero((twins >= 0) & ~self._in_val).tolist():
                twin = int(twins[number])
                if not self._in_val[twin]:
                    score = 1.0 if kind == "same words" else float(self._near.similarity[number])
                    pairs[min(number, twin), max(number, twin)] = (score, kind)
        ordered = sorted((-score, *pair, kind) for pair, (score, kind) in pairs.items())
        return [(-score, a, b, kind) for score, a, b, kind in ordered[: self._params.max_listed]]

    def leaked_share(self) -> float:
        """Share of val's documents that train knows: a twin in train, or much overlap."""
        known = self._known[self._overlap.documents] | (self._share >= self._params.leaked_overlap)
        return float(known.sum() / max(1, len(known)))

    def repeated_share(self) -> float:
        """Share of all documents that have a twin."""
        repeated = (self._same >= 0) | (self._near.twin >= 0)
        return float(repeated.sum() / max(1, len(repeated)))

    def report(self, describe: Describe) -> dict[str, Any]:
        """What was found.

        Returns:
            The number of `documents`, their `repetition` in numbers, `flagged` (documents of val: id,
            source, kind, twin, score) and `repeated` (the nearest twins within train).
        """
        return {
            "documents": self.documents,
            "repetition": self.numbers(),
            "flagged": self.flagged(describe),
            "repeated": self.repeated(describe),
        }

    def numbers(self) -> dict[str, Any]:
        """Count what was found: documents that have a twin, by kind, and where the twin lies."""
        overlap, same, near = self._overlap, self._same, self._near
        counts = {}
        for kind, twins, across in (
            ("same_words", same, (same >= 0) & (self._in_val != self._in_val[np.maximum(same, 0)])),
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
            "repeated_share": self.repeated_share(),
            "leaked_share": self.leaked_share(),
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
        """Numbers of all documents that the report names."""
        names = {number for _, *pair, _ in self._listed for number in pair}
        for number, _, twin, _ in self._flags():
            names |= {number, twin}
        return names

    def _flags(self) -> list[tuple[int, str, int, float]]:
        """(document of val, kind, twin, score), by document."""
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
        for place, number in enumerate(self._overlap.documents.tolist()):
            if self._overlap.seen[place] and self._share[place] > self._params.flagged_overlap:
                flags.append((number, "overlap", int(self._overlap.twins[place]), float(self._share[place])))
        return sorted(flags)

    def flagged(self, describe: Describe) -> list[dict[str, Any]]:
        """Every document of val that repeats another, or of which train has seen runs of words."""
        return [
            {**describe(number), "kind": kind, "twin": describe(twin), "score": round(score, 6)}
            for number, kind, twin, score in self._flags()
        ]

    def repeated(self, describe: Describe) -> list[dict[str, Any]]:
        """The nearest twins within train."""
        return [
            {**describe(number), "kind": kind, "twin": describe(twin), "score": round(score, 6)}
            for score, number, twin, kind in self._listed
        ]


def _describer(groups: list[Any], numbers: set[int]) -> Describe:
    """Look up id, source and nothing else of some documents, in one more pass over their row groups."""
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
