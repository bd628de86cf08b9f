"""Great Expectations on the documents: is this text fit to learn from?

The texts are read row group by row group and are never in memory together. Two tables are judged:

    corpus     one row: documents, bytes, ids that repeat, ids that are not the hash of their text. Exact,
               summed while reading, in 16 bytes a document.
    documents  one row of numbers for each document (`document_row`); of a corpus of more than
               `validation.max_rows` documents for a sample of about that many: those whose
               normalised text has a hash below a bound, so that it is the same sample everywhere, and two
               documents that differ in case and spacing only are in it together or not at all.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compactgpt.config import Validation
from compactgpt.documents import IdSet, Stored, row_groups, stream_row_group
from compactgpt.errors import CheckFailed
from compactgpt.progress import Progress, silent
from compactgpt.storage import clear_folder, verified_manifest

DATA_DOCS = {
    "expectations",
    "index.html",
    "static",
    "validations",
}  # what Great Expectations writes at the top
_EXCERPT_CHARACTERS = 80
_EXAMPLES = 3
_MEGABYTE = 1_000_000


class _Hashes:
    """What of a text the exact sums need, and the sample is drawn by; the text comes in parts."""

    def __init__(self) -> None:
        self._text, self._normalised = hashlib.sha256(), hashlib.sha256()
        self.n_bytes = 0

    def add(self, part: memoryview) -> str:
        """Take a part; returns its characters that are not white space."""
        self._text.update(part)
        self.n_bytes += len(part)
        dense = "".join(str(part, "utf-8").split())
        self._normalised.update(dense.casefold().encode("utf-8"))
        return dense

    def row(self, document_id: str) -> dict[str, Any]:
        """Say n_bytes, id_is_hash (the id is the text's), normalised (hash without case and spacing)."""
        return {
            "n_bytes": self.n_bytes,
            "id_is_hash": self._text.hexdigest()[:32] == document_id,
            "normalised": self._normalised.hexdigest()[:32],
        }


def hash_row(document: Stored) -> dict[str, Any]:
    """Describe one document by its hashes alone: see `_Hashes.row`."""
    hashes = _Hashes()
    for part in document.parts:
        hashes.add(part)
    return hashes.row(document.id)


def document_row(document: Stored) -> dict[str, Any]:
    """Describe one document by what the suite judges.

    Returns:
        id and source; excerpt (its first characters, none for a blank text); what `_Hashes.row` says;
        n_characters; n_nul (NUL characters); letter_share (letters among the characters that are not white
        space); replacement_share (U+FFFD among all characters).
    """
    hashes, excerpt = _Hashes(), ""
    counts = dict.fromkeys(("characters", "nul", "dense", "letters", "replacements"), 0)
    for part in document.parts:
        text, dense = str(part, "utf-8"), hashes.add(part)
        excerpt = excerpt or " ".join(text.split(None, _EXCERPT_CHARACTERS)[:_EXCERPT_CHARACTERS])
        counts["characters"] += len(text)
        counts["nul"] += text.count("\0")
        counts["dense"] += len(dense)
        counts["letters"] += sum(map(str.isalpha, dense))
        counts["replacements"] += text.count("\ufffd")
    return {
        "id": document.id,
        "source": document.source,
        "excerpt": excerpt[:_EXCERPT_CHARACTERS] or None,
        **hashes.row(document.id),
        "n_characters": counts["characters"],
        "n_nul": counts["nul"],
        "letter_share": counts["letters"] / max(1, counts["dense"]),
        "replacement_share": counts["replacements"] / max(1, counts["characters"]),
    }


def corpus_expectations(params: Validation) -> list[Any]:
    """List the expectations of the one row that describes the whole corpus."""
    from great_expectations import expectations as gxe

    least = {"documents": params.min_documents, "bytes": params.min_total_megabytes * _MEGABYTE}
    return [
        *(gxe.ExpectColumnSumToBeBetween(column=name, min_value=value) for name, value in least.items()),
        gxe.ExpectColumnSumToBeBetween(column="repeated_ids", max_value=0),
        gxe.ExpectColumnSumToBeBetween(column="wrong_ids", max_value=0),
    ]


def expectations(params: Validation) -> list[Any]:
    """List the expectations of the rows that describe documents."""
    from great_expectations import expectations as gxe

    mostly = params.mostly
    return [
        gxe.ExpectColumnValuesToBeUnique(column="id"),
        gxe.ExpectColumnValuesToMatchRegex(column="id", regex="^[0-9a-f]{32}$"),
        gxe.ExpectColumnValuesToBeInSet(column="id_is_hash", value_set=[True]),
        gxe.ExpectColumnValuesToNotBeNull(column="source"),
        gxe.ExpectColumnValuesToNotBeNull(column="excerpt"),
        gxe.ExpectColumnValuesToBeBetween(
            column="n_characters",
            min_value=params.min_characters,
            max_value=params.max_characters,
            mostly=mostly,
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="letter_share", min_value=params.min_letter_share, mostly=mostly
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="replacement_share", max_value=params.max_replacement_share, mostly=mostly
        ),
        gxe.ExpectColumnValuesToBeBetween(column="n_nul", max_value=0, mostly=mostly),
        gxe.ExpectColumnValuesToBeUnique(column="normalised", mostly=params.min_unique_share),
    ]


def validate(
    documents: Path, docs: Path, params: Validation, *, progress: Progress = silent
) -> dict[str, Any]:
    """Judge the documents, and write Great Expectations' own pages.

    Args:
        documents: folder of document shards.
        docs: folder for the pages, replaced; they carry the time, so nothing may depend on them.
        params: bounds of the suite.
        progress: told the documents read.

    Returns:
        The report: `success`, the exact sums, how many rows were judged, and what `judge` says of each
        expectation. It is the same for the same documents.

    Raises:
        MissingInput, BadData: the folder of documents is missing or damaged.
    """
    totals, rows = _read(documents, params.max_rows, progress)
    tables = [
        Table("corpus", [{"id": "corpus", "source": "all documents", **totals}], corpus_expectations(params)),
        Table("documents", rows, expectations(params)),
    ]
    outcomes = judge(tables, docs)
    return {
        "success": all(outcome["success"] for outcome in outcomes),
        **totals,
        "rows": len(rows),
        "expectations": outcomes,
    }


def _read(folder: Path, max_rows: int, progress: Progress) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The exact sums over a corpus, and the rows of its documents or of the sample."""
    total = verified_manifest(folder)["documents"]
    everything = total <= max_rows
    seen = IdSet()
    sums = {"documents": 0, "bytes": 0, "repeated_ids": 0, "wrong_ids": 0}
    rows: list[dict[str, Any]] = []
    for group in row_groups(folder):
        for document in stream_row_group(group):
            # A long document is read once.
            row = document_row(document) if everything or group.parts > 1 else hash_row(document)
            sums["documents"] += 1
            sums["bytes"] += row["n_bytes"]
            sums["wrong_ids"] += not row["id_is_hash"]
            sums["repeated_ids"] += not seen.add(hashlib.sha256(document.id.encode()).hexdigest()[:32])
            if everything or int(row["normalised"][:16], 16) * total < 2**64 * max_rows:
                rows.append(row if "source" in row else document_row(document))
        progress(sums["documents"], total)
    return sums, rows


def at_least(column: str, value: float) -> Any:
    """Expect every value of a column to be `value` or more."""
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=value)


def at_most(column: str, value: float) -> Any:
    """Expect every value of a column to be `value` or less."""
    from great_expectations import expectations as gxe

    return gxe.ExpectColumnValuesToBeBetween(column=column, max_value=value)


@dataclass(frozen=True)
class Table:
    """Rows, each with `id` and `source`, and what is expected of them."""

    name: str
    rows: list[dict[str, Any]]
    suite: list[Any]


def judge(tables: Sequence[Table], docs: Path) -> list[dict[str, Any]]:
    """Run each table's suite; see great_expectations 1.x, Checkpoint.run.

    Args:
        tables: what is judged.
        docs: folder for Great Expectations' own pages; earlier pages are replaced.

    Raises:
        NotAllowed: the folder has other files.

    Returns:
        Of each expectation its arguments, what was observed, how many rows break it and the first of them.
    """
    import great_expectations as gx
    import pandas as pd

    # A page that could not be written is a traceback to it; the stage tells of a full disk in a sentence.
    logging.getLogger("great_expectations.render.renderer.site_builder").setLevel(logging.CRITICAL)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    data = context.data_sources.add_pandas("tables")
    clear_folder(docs, DATA_DOCS)
    context.add_data_docs_site("pages", _site(docs))
    outcomes = []
    for table in tables:
        definition = gx.ValidationDefinition(
            name=table.name,
            data=data.add_dataframe_asset(table.name).add_batch_definition_whole_dataframe("all"),
            suite=context.suites.add(gx.ExpectationSuite(name=table.name, expectations=table.suite)),
        )
        checkpoint = gx.Checkpoint(
            name=table.name,
            validation_definitions=[context.validation_definitions.add(definition)],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="pages", site_names=["pages"])],
            result_format={
                "result_format": "SUMMARY",
                "unexpected_index_column_names": ["id", "source"],
                "partial_unexpected_count": _EXAMPLES,
            },
        )
        batch = {"dataframe": pd.DataFrame(table.rows)}
        (result,) = context.checkpoints.add(checkpoint).run(batch_parameters=batch).run_results.values()
        rows = len(table.rows)
        outcomes += [_outcome(table.name, rows, each) for each in result.to_json_dict()["results"]]
    return outcomes


def _site(docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(docs.resolve()),
        },
    }


def _outcome(table: str, rows: int, result: dict[str, Any]) -> dict[str, Any]:
    """Keep of one result what is the same in every run."""
    config, found = result["expectation_config"], result["result"]
    if "unexpected_count" not in found and "observed_value" not in found:
        raise RuntimeError(f"{config['type']} could not be judged: {result['exception_info']}")
    arguments = {key: value for key, value in config["kwargs"].items() if key not in ("batch_id", "column")}
    column = config["kwargs"].get("column")
    return {
        "table": table,
        "rows": rows,
        "expectation": config["type"],
        "column": column,
        "arguments": arguments,
        "success": result["success"],
        "observed": found.get("observed_value"),
        "unexpected": found.get("unexpected_count"),
        "examples": [
            {"id": row["id"], "source": row["source"], "value": row.get(column)}
            for row in found.get("partial_unexpected_index_list", [])
        ],
    }


def require_success(report: Mapping[str, Any], what: str, mend: str) -> None:
    """Stop the pipeline where an expectation failed.

    Args:
        report: of a stage; `expectations` is what `judge` returned.
        what: was judged, for the message.
        mend: what the user can do, for the message.

    Raises:
        CheckFailed: names each failed expectation, how many rows break it, and examples.
    """
    failed = [outcome for outcome in report["expectations"] if not outcome["success"]]
    if failed:
        lines = "\n".join(f"  {_sentence(outcome)}" for outcome in failed)
        raise CheckFailed(
            f"{what} fail {len(failed)} of {len(report['expectations'])} expectations:\n{lines}\n{mend}"
        )


def _sentence(outcome: Mapping[str, Any]) -> str:
    name = outcome["expectation"] + (f" of {outcome['column']}" if outcome["column"] else "")
    if outcome["arguments"]:
        name += " (" + ", ".join(f"{key} {value}" for key, value in outcome["arguments"].items()) + ")"
    if outcome["unexpected"] is None:
        return f"{name}: found {outcome['observed']}"
    examples = ", ".join(f"{row['source']} {row['id']} ({row['value']})" for row in outcome["examples"])
    return f"{name}: {outcome['unexpected']:,} of {outcome['rows']:,} rows break it, such as {examples}"
