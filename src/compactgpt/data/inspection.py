"""Check the token files, and find documents that repeat other documents.

A flagged document is a val document that repeats another document.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.storage import verified_manifest
from compactgpt.config import Inspection
from compactgpt.data.documents import row_groups
from compactgpt.data.duplicates import Digest, digest_documents, find_overlap, find_twins
from compactgpt.data.token_files import TokenFile, open_tokens
from compactgpt.data.tokenization import SPLITS, SplitRule, describe_splits, split_rule
from compactgpt.data.validation import Table, bound, check_expectations

if TYPE_CHECKING:
    import pandas as pd

_TOKENS_AT_ONCE = 2**24  # `_count_tokens` reads this many tokens at a time
# With fewer row groups for each worker process, starting the processes takes more time than they save.
_GROUPS_PER_WORKER = 8


def inspect(
    documents: Path,
    tokens: Path,
    docs: Path,
    params: Inspection,
    *,
    num_workers: int,
    corpus_name: str = "a corpus",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check the token files, write Data Docs into `docs`, and return the report.

    Data Docs show `corpus_name`. Raises MissingInput or BadData if an input is missing or damaged.
    """
    manifest, corpus_facts = verified_manifest(tokens), verified_manifest(documents)
    # Do not verify again: `verified_manifest` has verified the hashes of the token files.
    splits = {name: open_tokens(tokens / f"{name}.tokens", verify=False) for name in SPLITS}
    groups = row_groups(documents)
    rule = split_rule(groups, manifest.get("split", "hash"), manifest["val_fraction"], corpus_facts["bytes"])
    num_workers = min(num_workers, max(1, len(groups) // _GROUPS_PER_WORKER))
    corpus = digest_documents(groups, params, rule, corpus_facts["documents"], num_workers, progress)
    twins, overlap = find_twins(corpus, params), find_overlap(corpus)
    repetition = _count_repetition(len(corpus.documents), twins, overlap, params)
    tables = [_split_table(splits[name], name, corpus, rule, params) for name in SPLITS]
    tables.append(_repetition_table(repetition, params))
    num_documents = len(corpus.documents)
    results = check_expectations(f"inspection of {num_documents:,} documents of {corpus_name}", tables, docs)
    return {
        "success": all(result["success"] for result in results),
        **describe_splits(tokens),
        "documents": num_documents,
        "repetition": repetition,
        "flagged": _describe(_flagged(twins, overlap, params), corpus),
        "repeated": _describe(_repeated(twins, params), corpus),
        "expectations": results,
    }


def passed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether all checks passed, and the hash of each token file.

    The limits of the checks are left out, so that DVC does not train again when only a limit changes.
    """
    return {name: {"passed": report["success"], "sha256": report[name]["sha256"]} for name in SPLITS}


# --- the token files


def _split_table(split: TokenFile, name: str, corpus: Digest, rule: SplitRule, params: Inspection) -> Table:
    documents, of_split = split.header.documents, corpus.documents["in_val"] == (name == "val")
    row = {"documents": documents, **_count_tokens(split)}
    row["documents_that_differ"] = _count_differences(split, corpus.documents[of_split])
    least = params.min_val_documents if name == "val" else 1
    more = "add text, raise tokenization.val_fraction, or lower inspection.min_val_documents (fewer val "
    more += "documents widen the confidence intervals)"
    again, highest = "run `dvc repro -f tokenization`", split.header.vocab_size - 1
    suite = [
        bound("documents", f"{name}: documents", more, least=least),
        bound("highest_token", f"{name}: highest token id", again, most=highest),
        bound("documents_without_end", f"{name}: documents without end-of-text", again, most=0),
        bound("ends_inside", f"{name}: end-of-text tokens inside documents", again, most=0),
        bound("documents_that_differ", f"{name}: documents that differ from data/documents", again, most=0),
    ]
    if rule.val_start is None:  # tokenization.split is `hash`, so the val documents are a random sample
        share = rule.val_fraction if name == "val" else 1 - rule.val_fraction
        expected = share * len(corpus.documents)
        # In a random split, the number of val (or train) documents is binomial. Its standard deviation:
        deviation = math.sqrt(max(expected * (1 - share), 1e-9))
        row["share_deviation"] = abs(documents - expected) / deviation
        what = f"{name}: difference from the expected number of documents, in standard deviations"
        advice = "set tokenization.split to tail, or raise inspection.max_val_deviation"
        suite.append(bound("share_deviation", what, advice, most=params.max_val_deviation))
    return Table(name, [{"id": name, "source": split.path.name, **row}], suite)


def _count_tokens(split: TokenFile) -> dict[str, Any]:
    eot, highest, num_ends = split.header.eot_token, 0, 0
    for start in range(0, len(split.tokens), _TOKENS_AT_ONCE):
        part = split.tokens[start : start + _TOKENS_AT_ONCE]
        highest = max(highest, int(part.max()))
        num_ends += int(np.count_nonzero(part == eot))
    # A document must end with an end-of-text token, and must have no other end-of-text token.
    closed = int(np.count_nonzero(split.tokens[split.offsets[1:] - 1] == eot))
    return {
        "highest_token": highest,
        "documents_without_end": split.header.documents - closed,
        "ends_inside": num_ends - closed,
    }


def _count_differences(split: TokenFile, expected: "pd.DataFrame") -> int:
    """Return how many documents of a token file differ from `expected` in id or length."""
    found = zip(split.document_ids, split.byte_lengths, strict=True)
    wanted = zip(expected["id"], expected["bytes"], strict=True)
    return sum(one != other for one, other in zip_longest(found, wanted))


# --- documents that repeat other documents


def _count_repetition(
    documents: int, twins: "pd.DataFrame", overlap: "pd.DataFrame", params: Inspection
) -> dict[str, Any]:
    leaked = overlap["score"] >= params.leaked_overlap
    leaked |= overlap["document"].isin(twins[twins["across"]]["document"])
    near_duplicates = twins["document"].nunique()
    return {
        "near_duplicates": near_duplicates,
        "repeated_share": near_duplicates / max(1, documents),
        "leaked_share": int(leaked.sum()) / max(1, len(leaked)),  # divided by the number of val documents
        "ngrams": int(overlap["ngrams"].sum()),
        "ngrams_in_train": int(overlap["seen"].sum()),
        # A document with fewer than `overlap_words` words has no n-gram that `find_overlap` can find.
        "val_documents_without_ngrams": int((overlap["ngrams"] == 0).sum()),
    }


def _flagged(twins: "pd.DataFrame", overlap: "pd.DataFrame", params: Inspection) -> "pd.DataFrame":
    """Return a table of val documents: a row for a near duplicate, and one for a score above the limit."""
    import pandas as pd

    # A val document may have two rows: one for a twin in train (`across` is true), one for a twin in val. Put
    # the row for train first, because `drop_duplicates` keeps only the first row of each document.
    of_val = twins[twins["in_val"]].sort_values("across", ascending=False, kind="stable")
    of_val = of_val.drop_duplicates("document").assign(kind="near duplicate")
    in_train = overlap[(overlap["twin"] >= 0) & (overlap["score"] > params.flagged_overlap)]
    return pd.concat([of_val, in_train.assign(kind="overlap")]).sort_values(["document", "kind"])


def _repeated(twins: "pd.DataFrame", params: Inspection) -> "pd.DataFrame":
    """Return a table of the `max_listed` most similar pairs of train documents, each pair once."""
    pairs = twins[~twins["in_val"] & ~twins["across"]]
    lower, higher = pairs[["document", "twin"]].min(axis=1), pairs[["document", "twin"]].max(axis=1)
    pairs = pairs.assign(document=lower, twin=higher, kind="near duplicate")
    pairs = pairs.drop_duplicates(["document", "twin"])
    # Pairs with equal scores are sorted by document number.
    ordered = pairs.sort_values(["score", "document", "twin"], ascending=[False, True, True])
    return ordered.head(params.max_listed)


def uncompared(report: Mapping[str, Any], words: int) -> str:
    """Return a message if most val documents have fewer than `words` words; if not, an empty string."""
    short, total = report["repetition"]["val_documents_without_ngrams"], report["val"]["documents"]
    if 2 * short <= total:
        return ""
    return (
        f"{short:,} of {total:,} val documents have fewer than {words} words: the check can't find copies "
        "of these documents inside longer train documents. Use longer documents, or lower "
        "inspection.overlap_words"
    )


def _repetition_table(repetition: Mapping[str, Any], params: Inspection) -> Table:
    shares = {key: repetition[key] for key in ("repeated_share", "leaked_share")}
    twins, leaked = "share of documents that repeat another one", "share of val's documents that are in train"
    twins_advice = (
        "remove the documents that the report lists under `flagged` and `repeated`, or raise "
        "inspection.max_repeated_share"
    )
    leaked_advice = (
        "remove the documents that the report lists under `flagged`, or raise inspection.max_leaked_share"
    )
    suite = [
        bound("repeated_share", twins, twins_advice, most=params.max_repeated_share),
        bound("leaked_share", leaked, leaked_advice, most=params.max_leaked_share),
    ]
    return Table("repetition", [{"id": "corpus", "source": "all documents", **shares}], suite)


def _describe(repeats: "pd.DataFrame", corpus: Digest) -> list[dict[str, Any]]:
    """Return the rows of `repeats` for the report, with ids and sources instead of document numbers."""
    numbers = sorted({*repeats["document"], *repeats["twin"]})
    names: dict[Any, Any] = corpus.documents.loc[numbers, ["id", "source"]].to_dict("index")
    rows: Iterable[Any] = repeats.itertuples()
    return [
        {**names[row.document], "kind": row.kind, "twin": names[row.twin], "score": round(row.score, 6)}
        for row in rows
    ]
