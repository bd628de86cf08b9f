"""Check with Great Expectations that token files are intact, and that val does not repeat train.

Three tables of one row are checked: `train` and `val`, with counts of each token file, and `repetition`, with
the shares of documents that repeat others (duplicates.py). The report lists val documents that repeat others,
each with its twin. Evaluation compares these flagged documents with the other documents.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.storage import sha256_file, verified_manifest
from compactgpt.config import Inspection
from compactgpt.data.documents import row_groups
from compactgpt.data.duplicates import Digest, digest_documents, find_overlap, find_twins
from compactgpt.data.token_files import TokenFile, open_tokens
from compactgpt.data.tokenization import SPLITS, SplitRule, split_rule
from compactgpt.data.validation import Table, at_least, at_most, check_expectations

if TYPE_CHECKING:
    import pandas as pd

_TOKENS_AT_ONCE = 2**24
_GROUPS_PER_WORKER = 8  # with fewer row groups, another process costs more time than it saves


def inspect(
    documents: Path,
    tokens: Path,
    docs: Path,
    params: Inspection,
    *,
    num_workers: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check the token files, find documents that repeat others, write Data Docs, and return the report.

    The report has facts of each split, the counts and shares of repeated documents (`repetition`), the val
    documents that repeat others (`flagged`), the most similar twins within train (`repeated`), and the
    results of `check_expectations`. It does not depend on the number of workers.
    Raises MissingInput or BadData if an input is missing or damaged.
    """
    manifest, corpus_facts = verified_manifest(tokens), verified_manifest(documents)
    # `verified_manifest` has verified the hashes.
    splits = {name: open_tokens(tokens / f"{name}.tokens", verify=False) for name in SPLITS}
    groups = row_groups(documents)
    rule = split_rule(groups, manifest.get("split", "hash"), manifest["val_fraction"], corpus_facts["bytes"])
    num_workers = min(num_workers, max(1, len(groups) // _GROUPS_PER_WORKER))
    corpus = digest_documents(groups, params, rule, corpus_facts["documents"], num_workers, progress)
    twins, overlap = find_twins(corpus, params), find_overlap(corpus)
    repetition = _count_repetition(len(corpus.documents), twins, overlap, params)
    tables = [_split_table(splits[name], name, corpus, rule, params) for name in SPLITS]
    tables.append(_repetition_table(repetition, params))
    results = check_expectations("inspection", tables, docs)
    facts: dict[str, Any] = {
        name: {
            "documents": split.header.documents,
            "tokens": split.header.tokens,
            "bytes": int(split.byte_lengths.sum()),
            "sha256": sha256_file(split.path),
        }
        for name, split in splits.items()
    }
    return {
        "success": all(result["success"] for result in results),
        **facts,
        "documents": len(corpus.documents),
        "repetition": repetition,
        "flagged": _describe(_flagged(twins, overlap, params), corpus),
        "repeated": _describe(_repeated(twins, params), corpus),
        "expectations": results,
    }


def passed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training depends on: the hash of each token file, and whether the checks passed.

    The limits are not included, so that training does not run again when a limit changes.
    """
    return {name: {"passed": report["success"], "sha256": report[name]["sha256"]} for name in SPLITS}


# --- the token files


def _split_table(split: TokenFile, name: str, corpus: Digest, rule: SplitRule, params: Inspection) -> Table:
    documents, of_split = split.header.documents, corpus.documents["in_val"] == (name == "val")
    row = {"documents": documents, **_count_tokens(split)}
    row["documents_that_differ"] = _count_differences(split, corpus.documents[of_split])
    least = params.min_val_documents if name == "val" else 1
    more = "raise tokenization.val_fraction, add text, or set inspection.min_val_documents to "
    more += f"{documents:,}, which makes intervals wide"
    again = "run `dvc repro -f tokenization`"
    suite = [
        at_least("documents", least, f"{name}: documents", more),
        at_most("highest_token", split.header.vocab_size - 1, f"{name}: highest token id", again),
        at_most("documents_without_end", 0, f"{name}: documents without end-of-text", again),
        at_most("ends_inside", 0, f"{name}: end-of-text tokens inside documents", again),
        at_most("documents_that_differ", 0, f"{name}: documents that differ from data/documents", again),
    ]
    # The split has its share of the documents (split `hash`) or of the bytes of text (split `tail`).
    share = rule.val_fraction if name == "val" else 1 - rule.val_fraction
    if rule.val_start is None:
        expected = share * len(corpus.documents)
        deviation = math.sqrt(max(expected * (1 - share), 1e-9))  # of a binomial count
        row["share_deviation"] = abs(documents - expected) / deviation
        what = f"{name}: standard deviations of its size from a fair split"
        advice = "set tokenization.split to tail, or raise inspection.max_val_deviation"
        suite.append(at_most("share_deviation", params.max_val_deviation, what, advice))
    else:
        sizes = corpus.documents["bytes"]
        row["bytes_off_share"] = round(abs(int(split.byte_lengths.sum()) - share * int(sizes.sum())))
        # Val begins at a document, so its size may differ from its share by at most the longest document.
        what = f"{name}: bytes that its share is off"
        suite.append(at_most("bytes_off_share", int(sizes.max()), what, again))
    return Table(name, [{"id": name, "source": split.path.name, **row}], suite)


def _count_tokens(split: TokenFile) -> dict[str, Any]:
    """Return the highest token id, and the numbers of missing and of misplaced end-of-text tokens."""
    eot, highest, ends = split.header.eot_token, 0, 0
    for start in range(0, len(split.tokens), _TOKENS_AT_ONCE):
        part = split.tokens[start : start + _TOKENS_AT_ONCE]
        highest = max(highest, int(part.max()))
        ends += int(np.count_nonzero(part == eot))
    # The last token of a document must be its only end-of-text token.
    closed = int(np.count_nonzero(split.tokens[split.offsets[1:] - 1] == eot))
    return {
        "highest_token": highest,
        "documents_without_end": split.header.documents - closed,
        "ends_inside": ends - closed,
    }


def _count_differences(split: TokenFile, expected: "pd.DataFrame") -> int:
    """Count the documents of a split whose id or length is not the expected one at the same position."""
    # Compare the positions that both have. Each further document of the longer one is a difference.
    both = min(len(expected), split.header.documents)
    other_ids = expected["id"].to_numpy()[:both] != np.array(split.document_ids[:both], object)
    other_lengths = expected["bytes"].to_numpy()[:both] != split.byte_lengths[:both]
    return int((other_ids | other_lengths).sum()) + abs(len(expected) - split.header.documents)


# --- repetition


def _count_repetition(
    documents: int, twins: "pd.DataFrame", overlap: "pd.DataFrame", params: Inspection
) -> dict[str, Any]:
    """Count the documents that have a twin, by kind, and the val documents that are in train."""
    counts = {}
    for key, kind in (("same_words", "same words"), ("near_duplicates", "near duplicate")):
        of_kind = twins[twins["kind"] == kind]
        in_val = of_kind.drop_duplicates("document")["in_val"]
        counts[key] = {
            "documents": len(in_val),
            "train": int((~in_val).sum()),
            "val": int(in_val.sum()),
            "val_with_twin_in_train": int((of_kind["in_val"] & of_kind["across"]).sum()),
        }
    overlaps = overlap["score"] >= params.leaked_overlap
    leaked = overlaps | overlap["document"].isin(twins[twins["across"]]["document"])
    return {
        **counts,
        "repeated_share": twins["document"].nunique() / max(1, documents),
        "leaked_share": int(leaked.sum()) / max(1, len(leaked)),  # share of the val documents
        "overlap": {
            "words": params.overlap_words,
            "runs": int(overlap["runs"].sum()),
            "runs_in_train": int(overlap["seen"].sum()),
            "val_documents": len(overlap),
            # A document of fewer words has no run: it is only compared with complete documents.
            "val_documents_without_runs": int((overlap["runs"] == 0).sum()),
            "val_documents_with_any": int((overlap["seen"] > 0).sum()),
            "val_documents_leaked": int(overlaps.sum()),
        },
    }


def _flagged(twins: "pd.DataFrame", overlap: "pd.DataFrame", params: Inspection) -> "pd.DataFrame":
    """Return the val documents that have a twin, or whose text is in train; a twin in train is preferred."""
    import pandas as pd

    of_val = twins[twins["in_val"]].sort_values("across", ascending=False, kind="stable")
    in_train = overlap[(overlap["twin"] >= 0) & (overlap["score"] > params.flagged_overlap)]
    flagged = pd.concat([of_val.drop_duplicates(["kind", "document"]), in_train.assign(kind="overlap")])
    return flagged.sort_values(["document", "kind"])


def _repeated(twins: "pd.DataFrame", params: Inspection) -> "pd.DataFrame":
    """Return the most similar twins within train, each pair once."""
    nearest = twins.drop_duplicates(["kind", "document"])
    pairs = nearest[~nearest["in_val"] & ~nearest["across"]]
    lower, higher = pairs[["document", "twin"]].min(axis=1), pairs[["document", "twin"]].max(axis=1)
    # A pair of both kinds is listed as `same words`, which comes first.
    pairs = pairs.assign(document=lower, twin=higher).drop_duplicates(["document", "twin"])
    # Equal scores are sorted in corpus order, so that the list does not depend on the workers.
    ordered = pairs.sort_values(["score", "document", "twin"], ascending=[False, True, True])
    return ordered.head(params.max_listed)


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
    twin, leaked = "share of documents that have a twin", "share of val's documents that are in train"
    leaked += uncompared(repetition)
    advice = "remove the documents that the report lists ({}), or raise inspection.max_{}"
    repeated_advice = advice.format("repeated, flagged", "repeated_share")
    leaked_advice = advice.format("flagged", "leaked_share")
    suite = [
        at_most("repeated_share", params.max_repeated_share, twin, repeated_advice),
        at_most("leaked_share", params.max_leaked_share, leaked, leaked_advice),
    ]
    return Table("repetition", [{"id": "corpus", "source": "all documents", **shares}], suite)


def _describe(repeats: "pd.DataFrame", corpus: Digest) -> list[dict[str, Any]]:
    """Return a list for the report, with ids and sources in place of document numbers."""
    numbers = sorted({*repeats["document"], *repeats["twin"]})
    names: dict[Any, Any] = corpus.documents.loc[numbers, ["id", "source"]].to_dict("index")
    rows: list[dict[Any, Any]] = repeats.to_dict("records")
    return [
        {
            **names[row["document"]],
            "kind": row["kind"],
            "twin": names[row["twin"]],
            "score": round(row["score"], 6),
        }
        for row in rows
    ]
