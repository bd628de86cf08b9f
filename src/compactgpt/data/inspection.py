"""Check with Great Expectations that token files are intact, and that val does not repeat train.

Three tables of one row are checked:

    train, val     Token ids are below the vocabulary size. Every document ends with an end-of-text token and
                   has no other. Ids, lengths and order of the documents are those of data/documents. The
                   number of documents is at least the minimum. The split has its share of the documents
                   (split `hash`) or of the bytes of text (split `tail`).
    repetition     The shares of documents that repeat others, and of val documents that are in train, do
                   not exceed their limits (duplicates.py).

The report lists val documents that repeat others, each with its twin. Evaluation compares these flagged
documents with the other documents. The result does not depend on the number of workers.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.storage import sha256_file, verified_manifest
from compactgpt.config import Inspection
from compactgpt.data.documents import RowGroup, read_names, row_groups
from compactgpt.data.duplicates import (
    Digest,
    Overlap,
    Twins,
    digest_documents,
    find_near_duplicates,
    find_overlap,
    find_same_words,
)
from compactgpt.data.token_files import TokenFile, open_tokens
from compactgpt.data.tokenization import SPLITS, SplitRule, split_rule
from compactgpt.data.validation import Table, at_least, at_most, check_expectations

_TOKENS_AT_ONCE = 2**24
_GROUPS_PER_WORKER = 8  # with fewer row groups, another process costs more time than it saves

# (number of a document, kind of repetition, number of the document's twin, score from 0 to 1)
Repeat = tuple[int, str, int, float]
TwinPair = tuple[Twins, Twins]  # (twins among all documents, twins in the other split)


def inspect(
    documents: Path,
    tokens: Path,
    docs: Path,
    params: Inspection,
    *,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check the token files, find documents that repeat others, and return the report.

    Args:
        documents: folder of the document shards that the token files were made from.
        tokens: folder of token files.
        docs: folder for Data Docs, replaced.
        params: the section `inspection` of params.yaml.
        num_workers: number of processes; the result does not depend on it.
        progress: called with the number of documents read.

    Returns:
        The report: `success`, facts of each split, `documents` (their number), `repetition` (counts and
        shares), `flagged` (val documents that repeat others: id, source, kind, twin, score), `repeated` (the
        most similar twins within train), and `expectations` (the results of `check_expectations`).

    Raises MissingInput or BadData if an input is missing or damaged.
    """
    manifest, corpus_facts = verified_manifest(tokens), verified_manifest(documents)
    # `verified_manifest` has verified the hashes.
    splits = {name: open_tokens(tokens / f"{name}.tokens", verify=False) for name in SPLITS}
    groups = row_groups(documents)
    rule = split_rule(groups, manifest.get("split", "hash"), manifest["val_fraction"], corpus_facts["bytes"])
    num_workers = min(num_workers, max(1, len(groups) // _GROUPS_PER_WORKER))
    corpus = digest_documents(groups, params, rule, corpus_facts["documents"], num_workers, progress)
    repetition, flagged, repeated = _find_repetition(corpus, params)
    tables = [_split_table(splits[name], name, corpus, rule, params) for name in SPLITS]
    tables.append(_repetition_table(repetition, params))
    results = check_expectations("inspection", tables, docs)
    return {
        "success": all(result["success"] for result in results),
        **{name: _facts(split) for name, split in splits.items()},
        "documents": len(corpus.ids),
        "repetition": repetition,
        "flagged": _describe(flagged, groups),
        "repeated": _describe(repeated, groups),
        "expectations": results,
    }


def passed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training depends on: the hash of each token file, and whether the checks passed.

    The limits are not included, so that training does not run again when a limit changes.
    """
    return {name: {"passed": report["success"], "sha256": report[name]["sha256"]} for name in SPLITS}


def _facts(split: TokenFile) -> dict[str, Any]:
    return {
        "documents": split.header.documents,
        "tokens": split.header.tokens,
        "bytes": int(split.byte_lengths.sum()),
        "sha256": sha256_file(split.path),
    }


# --- the token files


def _split_table(split: TokenFile, name: str, corpus: Digest, rule: SplitRule, params: Inspection) -> Table:
    # The only row of the table.
    row = {
        "id": name,
        "source": split.path.name,
        "documents": split.header.documents,
        **_count_tokens(split),
        "documents_that_differ": _count_differences(split, corpus, corpus.in_val == (name == "val")),
    }
    least = params.min_val_documents if name == "val" else 1
    suite = [
        at_least("documents", least, f"{name}: documents"),
        at_most("highest_token", split.header.vocab_size - 1, f"{name}: highest token id"),
        at_most("documents_without_end", 0, f"{name}: documents without end-of-text"),
        at_most("ends_inside", 0, f"{name}: end-of-text tokens inside documents"),
        at_most("documents_that_differ", 0, f"{name}: documents that differ from data/documents"),
    ]
    column, row[column], expectation = _share_check(split, name, corpus, rule, params)
    suite.append(expectation)
    advice = {
        "documents": "raise tokenization.val_fraction, add text, or set inspection.min_val_documents to "
        f"{split.header.documents:,}, which makes intervals wide",
        "share_deviation": "set tokenization.split to tail, or raise inspection.max_val_deviation",
    }
    return Table(name, [row], suite, dict.fromkeys(row, "run `dvc repro -f tokenization`") | advice)


def _share_check(
    split: TokenFile, name: str, corpus: Digest, rule: SplitRule, params: Inspection
) -> tuple[str, float, Any]:
    """Return a column, its value and its expectation: whether a split has its share of the corpus."""
    share = rule.val_fraction if name == "val" else 1 - rule.val_fraction
    if rule.val_start is None:
        expected = share * len(corpus.ids)
        deviation = math.sqrt(max(expected * (1 - share), 1e-9))  # of a binomial count
        column, value = "share_deviation", abs(split.header.documents - expected) / deviation
        what = f"{name}: standard deviations of its size from a fair split"
        return column, value, at_most(column, params.max_val_deviation, what)
    value = round(abs(int(split.byte_lengths.sum()) - share * int(corpus.byte_lengths.sum())))
    # Val begins at a document, so its size may differ from its share by at most the longest document.
    longest = int(corpus.byte_lengths.max())
    column, what = "bytes_off_share", f"{name}: bytes that its share is off"
    return column, value, at_most(column, longest, what)


def _count_tokens(split: TokenFile) -> dict[str, int]:
    """Return the highest token id, and the numbers of missing and of misplaced end-of-text tokens."""
    eot, highest, ends = split.header.eot_token, 0, 0
    for start in range(0, len(split.tokens), _TOKENS_AT_ONCE):
        piece = split.tokens[start : start + _TOKENS_AT_ONCE]
        highest = max(highest, int(piece.max()))
        ends += int(np.count_nonzero(piece == eot))
    # The last token of a document must be its only end-of-text token.
    closed = int(np.count_nonzero(split.tokens[split.offsets[1:] - 1] == eot))
    return {
        "highest_token": highest,
        "documents_without_end": split.header.documents - closed,
        "ends_inside": ends - closed,
    }


def _count_differences(split: TokenFile, corpus: Digest, in_split: Any) -> int:
    """Count the documents of a split whose id or length differs from the corpus at the same position."""
    ids, byte_lengths = corpus.ids[in_split], corpus.byte_lengths[in_split]
    # Compare the positions that both have. Each further document of the longer one is a difference.
    both = min(len(ids), len(split.ids))
    differs = (ids[:both] != split.ids[:both]).any(axis=1) | (
        byte_lengths[:both] != split.byte_lengths[:both]
    )
    return int(differs.sum()) + abs(len(ids) - len(split.ids))


# --- repetition


def _find_repetition(corpus: Digest, params: Inspection) -> tuple[dict[str, Any], list[Repeat], list[Repeat]]:
    """Return the report's `repetition`, `flagged` and `repeated`, with document numbers instead of ids."""
    overlap = find_overlap(corpus)
    twins = {"same words": find_same_words(corpus), "near duplicate": find_near_duplicates(corpus, params)}
    return (
        _count_repetition(corpus, twins, overlap, params),
        _flagged(corpus, twins, overlap, params),
        _repeated(corpus, twins, params.max_listed),
    )


def _count_repetition(
    corpus: Digest, twins: Mapping[str, TwinPair], overlap: Overlap, params: Inspection
) -> dict[str, Any]:
    """Count the documents that have a twin, by kind, and the val documents that are in train."""
    has_twin, has_twin_across = np.zeros((2, len(corpus.in_val)), np.bool_)
    counts = {}
    for kind, (nearest, across) in twins.items():
        found, found_across = nearest.twin >= 0, across.twin >= 0
        has_twin |= found
        has_twin_across |= found_across
        counts[kind] = {
            "documents": int(found.sum()),
            "train": int((found & ~corpus.in_val).sum()),
            "val": int((found & corpus.in_val).sum()),
            "val_with_twin_in_train": int((found_across & corpus.in_val).sum()),
        }
    overlaps = overlap.share >= params.leaked_overlap
    leaked = has_twin_across[overlap.documents] | overlaps
    return {
        "same_words": counts["same words"],
        "near_duplicates": counts["near duplicate"],
        "repeated_share": float(has_twin.sum() / max(1, len(has_twin))),
        "leaked_share": float(leaked.sum() / max(1, len(leaked))),  # share of the val documents
        "overlap": {
            "words": params.overlap_words,
            "runs": int(overlap.runs.sum()),
            "runs_in_train": int(overlap.seen.sum()),
            "val_documents": len(overlap.runs),
            # A document of fewer words has no run: it is only compared with complete documents.
            "val_documents_without_runs": int((overlap.runs == 0).sum()),
            "val_documents_with_any": int((overlap.seen > 0).sum()),
            "val_documents_leaked": int(overlaps.sum()),
        },
    }


def _flagged(
    corpus: Digest, twins: Mapping[str, TwinPair], overlap: Overlap, params: Inspection
) -> list[Repeat]:
    """List the val documents that repeat others.

    These documents have a twin, or more than `flagged_overlap` of their runs of words are in train.
    """
    repeats: list[Repeat] = []
    for kind, (nearest, across) in twins.items():
        for number in np.flatnonzero((nearest.twin >= 0) & corpus.in_val).tolist():
            best = across if across.twin[number] >= 0 else nearest  # prefer a twin in train
            repeats.append((number, kind, int(best.twin[number]), float(best.similarity[number])))
    for number, twin, share in zip(overlap.documents, overlap.twins, overlap.share, strict=True):
        if twin >= 0 and share > params.flagged_overlap:
            repeats.append((int(number), "overlap", int(twin), float(share)))
    return sorted(repeats)


def _repeated(corpus: Digest, twins: Mapping[str, TwinPair], max_listed: int) -> list[Repeat]:
    """List the most similar twins within train, each pair once."""
    pairs = {}
    for kind in ("near duplicate", "same words"):  # if a pair is both, "same words" is kept
        nearest, _ = twins[kind]
        in_train = (nearest.twin >= 0) & ~corpus.in_val & ~corpus.in_val[nearest.twin]
        for number in np.flatnonzero(in_train).tolist():
            first, second = sorted((number, int(nearest.twin[number])))
            pairs[first, second] = (first, kind, second, float(nearest.similarity[number]))
    # Equal scores are sorted in corpus order, so that the list does not depend on the workers.
    by_score = sorted(pairs.values(), key=lambda repeat: (-repeat[3], repeat[0], repeat[2]))
    return by_score[:max_listed]


def uncompared(repetition: Mapping[str, Any]) -> str:
    """Return a note if most val documents are too short for the search of overlap, else an empty text."""
    overlap = repetition["overlap"]
    short, total = overlap["val_documents_without_runs"], overlap["val_documents"]
    if 2 * short <= total:
        return ""
    return (
        f" ({short:,} of {total:,} have fewer than {overlap['words']} words: of these only copies are found, "
        "so this check says little; longer documents or a lower inspection.overlap_words say more)"
    )


def _repetition_table(repetition: Mapping[str, Any], params: Inspection) -> Table:
    shares = {key: repetition[key] for key in ("repeated_share", "leaked_share")}
    leaked = f"share of val's documents that are in train{uncompared(repetition)}"
    suite = [
        at_most("repeated_share", params.max_repeated_share, "share of documents that have a twin"),
        at_most("leaked_share", params.max_leaked_share, leaked),
    ]
    advice = {
        key: f"remove the documents that the report lists ({listed}), or raise inspection.max_{key}"
        for key, listed in (("repeated_share", "repeated, flagged"), ("leaked_share", "flagged"))
    }
    return Table("repetition", [{"id": "corpus", "source": "all documents", **shares}], suite, advice)


def _describe(repeats: list[Repeat], groups: list[RowGroup]) -> list[dict[str, Any]]:
    """Replace document numbers by ids and sources, in one pass over the corpus."""
    # The lists are short, so reading the sources now takes less memory than keeping all of them.
    wanted = {number for document, _, twin, _ in repeats for number in (document, twin)}
    names = (name for group in groups for name in read_names(group))
    described = {
        number: {"id": document_id, "source": source}
        for number, (document_id, source) in enumerate(names)
        if number in wanted
    }
    return [
        {**described[document], "kind": kind, "twin": described[twin], "score": round(score, 6)}
        for document, kind, twin, score in repeats
    ]
