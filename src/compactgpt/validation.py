"""Great Expectations on the documents: is this text fit to learn from?

Each document becomes one row of numbers (`document_row`), read shard by shard, and the suite judges the
rows; so the texts are never in memory together.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.config import Validation
from compactgpt.documents import Document, new_document, read_row_group, row_groups
from compactgpt.errors import CheckFailed
from compactgpt.progress import Progress, silent
from compactgpt.storage import verified_manifest

_EXCERPT_CHARACTERS = 80
_EXAMPLES = 3
_MEGABYTE = 1_000_000


def document_row(document: Document) -> dict[str, Any]:
    """Describe one document by what the suite judges.

    Returns:
        id and source; excerpt (its first characters, none for a blank text); id_is_hash (the id is that
        of the text); normalised (a hash of the text without its case and spacing); n_bytes; n_characters;
        n_nul (NUL characters); letter_share (letters among the characters that are not white space);
        replacement_share (U+FFFD among all characters).
    """
    text = document.text
    words = text.split()
    dense = "".join(words)
    excerpt = " ".join(words[:_EXCERPT_CHARACTERS])[:_EXCERPT_CHARACTERS]
    return {
        "id": document.id,
        "source": document.source,
        "excerpt": excerpt or None,
        "id_is_hash": new_document(text, document.source).id == document.id,
        "normalised": hashlib.sha256(dense.casefold().encode("utf-8")).hexdigest()[:32],
        "n_bytes": len(text.encode("utf-8")),
        "n_characters": len(text),
        "n_nul": text.count("\0"),
        "letter_share": sum(map(str.isalpha, dense)) / max(1, len(dense)),
        "replacement_share": text.count("\ufffd") / max(1, len(text)),
    }


def expectations(params: Validation) -> list[Any]:
    """List the Great Expectations expectations of a corpus."""
    from great_expectations import expectations as gxe

    mostly = params.mostly
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=params.min_documents),
        gxe.ExpectColumnSumToBeBetween(column="n_bytes", min_value=params.min_total_megabytes * _MEGABYTE),
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
        The report: `success`, and of each expectation its arguments, what was observed, how many
        documents break it and the first of them. It is the same for the same documents.

    Raises:
        MissingInput, BadData: the folder of documents is missing or damaged.
    """
    rows = _rows(documents, progress)
    results = _run_suite(rows, expectations(params), docs)
    outcomes = [_outcome(result) for result in results]
    return {
        "success": all(outcome["success"] for outcome in outcomes),
        "documents": len(rows),
        "bytes": sum(row["n_bytes"] for row in rows),
        "expectations": outcomes,
    }


def _rows(folder: Path, progress: Progress) -> list[dict[str, Any]]:
    total = verified_manifest(folder)["documents"]
    rows: list[dict[str, Any]] = []
    for group in row_groups(folder):
        rows += map(document_row, read_row_group(group))
        progress(len(rows), total)
    return rows


def _run_suite(rows: list[dict[str, Any]], suite: list[Any], docs: Path) -> list[dict[str, Any]]:
    """Run a suite over rows; see great_expectations 1.x, Checkpoint.run."""
    import great_expectations as gx
    import pandas as pd

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    data = context.data_sources.add_pandas("documents").add_dataframe_asset("documents")
    definition = gx.ValidationDefinition(
        name="documents",
        data=data.add_batch_definition_whole_dataframe("all"),
        suite=context.suites.add(gx.ExpectationSuite(name="documents", expectations=suite)),
    )
    shutil.rmtree(docs, ignore_errors=True)
    context.add_data_docs_site("pages", _site(docs))
    checkpoint = gx.Checkpoint(
        name="documents",
        validation_definitions=[context.validation_definitions.add(definition)],
        actions=[gx.checkpoint.UpdateDataDocsAction(name="pages", site_names=["pages"])],
        result_format={
            "result_format": "SUMMARY",
            "unexpected_index_column_names": ["id", "source"],
            "partial_unexpected_count": _EXAMPLES,
        },
    )
    found = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": pd.DataFrame(rows)})
    (result,) = found.run_results.values()
    return list(result.to_json_dict()["results"])


def _site(docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(docs.resolve()),
        },
    }


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """Keep of one result what is the same in every run."""
    config, found = result["expectation_config"], result["result"]
    if "unexpected_count" not in found and "observed_value" not in found:
        raise RuntimeError(f"{config['type']} could not be judged: {result['exception_info']}")
    arguments = {key: value for key, value in config["kwargs"].items() if key not in ("batch_id", "column")}
    column = config["kwargs"].get("column")
    return {
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


def require_success(report: Mapping[str, Any]) -> None:
    """Stop the pipeline where an expectation failed.

    Raises:
        CheckFailed: names each failed expectation, how many documents break it, and examples.
    """
    failed = [outcome for outcome in report["expectations"] if not outcome["success"]]
    if failed:
        lines = "\n".join(f"  {_sentence(outcome, report['documents'])}" for outcome in failed)
        raise CheckFailed(
            f"the documents fail {len(failed)} of {len(report['expectations'])} expectations:\n{lines}\n"
            "mend the corpus, or change the bounds in params.yaml (validation)"
        )


def _sentence(outcome: Mapping[str, Any], documents: int) -> str:
    name = outcome["expectation"] + (f" of {outcome['column']}" if outcome["column"] else "")
    if outcome["arguments"]:
        name += " (" + ", ".join(f"{key} {value}" for key, value in outcome["arguments"].items()) + ")"
    if outcome["unexpected"] is None:
        return f"{name}: found {outcome['observed']}"
    examples = ", ".join(f"{row['source']} {row['id']} ({row['value']})" for row in outcome["examples"])
    return f"{name}: {outcome['unexpected']:,} of {documents:,} documents break it, such as {examples}"
