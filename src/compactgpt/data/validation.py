"""Check the documents with Great Expectations (GX).

An expectation is a rule for a column of a table. Data Docs are GX's pages of results.
"""

import hashlib
import html
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadConfig, CheckFailed
from compactgpt.common.storage import atomic_folder, verified_manifest
from compactgpt.config import Validation
from compactgpt.data.documents import Document, read_row_group, row_groups

_EXCERPT_CHARACTERS = 80
_ALTERED = "the files of data/documents were altered: run `dvc repro -f download`"
_EXAMPLES = 3  # how many documents are listed in the result of a failed expectation
_PLUGINS = Path(__file__).parent / "data_docs"  # contains the style sheet and the index page for Data Docs
# HTML in Data Docs that loads files from other servers. It is removed: offline, a browser would wait.
_REMOTE = re.compile(
    r"<script\b.*?</script>|<(?:link|img)\b[^>]*https?://[^>]*>|url\('https?://[^)]*\)", re.DOTALL
)


class Table(NamedTuple):
    """A table to check: rows with the keys `id` and `source`, and expectations (`suite`)."""

    name: str
    rows: list[dict[str, Any]]
    suite: list[Any]


def validate(
    documents: Path,
    docs: Path,
    params: Validation,
    *,
    corpus_name: str = "a corpus",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check the documents, write Data Docs into `docs`, and return the report.

    Data Docs show `corpus_name`. Of a large corpus, GX checks a sample of about `params.max_rows` documents.
    Raises BadConfig if this sample is empty.
    """
    manifest = verified_manifest(documents)
    total = manifest["documents"]
    counts = {"documents": 0, "bytes": 0, "wrong_ids": 0}
    id_hashes = bytearray()  # a 16-byte hash of each id, because a wrong id may have any length
    rows: list[dict[str, Any]] = []
    for group in row_groups(documents):
        for document in read_row_group(group):
            counts["documents"] += 1
            counts["bytes"] += len(document.text.encode())
            counts["wrong_ids"] += _hash(document.text) != document.id
            id_hashes += bytes.fromhex(_hash(document.id))
            # Choose by the hash of the text, so that equal texts are either all in the sample or all outside.
            # Compare integers, because floats would be rounded.
            hash_bound = 2**64 * params.max_rows
            if total <= params.max_rows or int(_normalised_hash(document.text)[:16], 16) * total < hash_bound:
                rows.append(document_row(document))
        progress(counts["documents"], total)
    if not rows:
        raise BadConfig(
            f"validation.max_rows is {params.max_rows:,}, and the sample of {total:,} documents is empty: "
            "too many of them are equal (case and white space are ignored). Remove copies, or set "
            f"validation.max_rows to {total}, which checks all documents"
        )
    counts["repeated_ids"] = counts["documents"] - len(np.unique(np.frombuffer(id_hashes, "S16")))
    corpus = {"id": "corpus", "source": "all documents", **counts}
    tables = [
        Table("corpus", [corpus], corpus_expectations(params, manifest)),
        Table("documents", rows, document_expectations(params)),
    ]
    results = check_expectations(f"validation of {total:,} documents of {corpus_name}", tables, docs)
    success = all(result["success"] for result in results)
    return {"success": success, **counts, "rows": len(rows), "expectations": results}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _normalised_hash(text: str) -> str:
    return _hash("".join(text.split()).casefold())


def document_row(document: Document) -> dict[str, Any]:
    """Return the row of one document for the table `documents`."""
    text = document.text
    dense = "".join(text.split())
    excerpt = " ".join(text.split(None, _EXCERPT_CHARACTERS)[:_EXCERPT_CHARACTERS])
    return {
        "id": document.id,
        "source": document.source,
        "excerpt": excerpt[:_EXCERPT_CHARACTERS] or None,  # None if the text is blank
        "n_characters": len(text),
        "id_is_hash": _hash(text) == document.id,
        "normalised": _normalised_hash(text),
        "n_nul": text.count("\0"),
        # The share of letters, white space not counted; 0 if the text is blank.
        "letter_share": sum(map(str.isalpha, dense)) / max(1, len(dense)),
        "replacement_share": text.count("\ufffd") / max(1, len(text)),
    }


# --- expectations


def bound(
    column: str, what: str, advice: str, *, least: float | None = None, most: float | None = None
) -> Any:
    """Return an expectation for a one-row table: the value in `column` is from `least` to `most`.

    None sets no limit. In the message of a failure, `what` names the value, and `advice` says what to do.
    """
    from great_expectations import expectations as gxe

    expected = f"at most {most:,}" if most else "none"
    if least is not None:
        expected = f"at least {least:,}"
    # The table has one row, so the maximum of the column is the value in this row.
    return gxe.ExpectColumnMaxToBeBetween(
        column=column,
        min_value=least,
        max_value=most,
        description=f"{what}: {expected}",
        meta={"what": what, "expected": expected, "advice": advice},
    )


def corpus_expectations(params: Validation, manifest: Mapping[str, Any]) -> list[Any]:
    """Return the expectations of the table `corpus`. `manifest` is the manifest of the documents' folder."""
    numbers = manifest.get("left_out", {}).items()
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in numbers if number)
    more = "let download take more of the corpus"
    if manifest.get("corpus") == "files":
        more = "add text"
        if manifest["documents"] == 1 and not left_out:
            more = "if the corpus is one file, set download.files.split, otherwise add text"
        more += ", or run `compactgpt init-corpus corpus/`, which sets limits that fit"
    if left_out:
        more = f"left out by download: {left_out}; {more}"
    least_bytes = round(params.min_total_megabytes * 1_000_000)
    return [
        bound("documents", "documents", more, least=params.min_documents),
        bound("bytes", "bytes of text", more, least=least_bytes),
        bound("repeated_ids", "documents with the id of an earlier document", _ALTERED, most=0),
        bound("wrong_ids", "documents whose id is not the hash of their text", _ALTERED, most=0),
    ]


def document_expectations(params: Validation) -> list[Any]:
    """Return the expectations of the table `documents`."""
    from great_expectations import expectations as gxe

    def values(kind: str, column: str, description: str, advice: str, **arguments: Any) -> Any:
        expectation = getattr(gxe, f"ExpectColumnValuesTo{kind}")
        return expectation(column=column, description=description, meta={"advice": advice}, **arguments)

    def between(column: str, description: str, advice: str, **bounds: float) -> Any:
        description = f"{100 * params.mostly:g} % of the documents have {description}"
        return values("BeBetween", column, description, advice, mostly=params.mostly, **bounds)

    shortest, longest = params.min_characters, params.max_characters
    length = f"{shortest:,} to {longest:,} characters"
    cut = "remove or cut them, or change validation.min_characters and validation.max_characters"
    letters = f"a share of letters of at least {params.min_letter_share:g}"
    damage = f"a share of U+FFFD characters of at most {params.max_replacement_share:g} "
    damage += "(U+FFFD replaces bytes that can't be decoded)"
    decoding = "convert the file to UTF-8 from the encoding that it was written in (iconv)"
    unique = f"at least {100 * params.min_unique_share:g} % of the documents are unique "
    unique += "(case and white space are ignored)"
    few_letters = "remove them, or lower validation.min_letter_share"
    copies = "remove copies, or lower validation.min_unique_share"
    return [
        values("BeUnique", "id", "every id is unique", _ALTERED),
        values("MatchRegex", "id", "every id has 32 hex digits", _ALTERED, regex="^[0-9a-f]{32}$"),
        values("BeInSet", "id_is_hash", "every id is the hash of its text", _ALTERED, value_set=[True]),
        values("NotBeNull", "source", "every document names its source", _ALTERED),
        values("NotBeNull", "excerpt", "no document is blank", "remove the blank documents"),
        between("n_characters", length, cut, min_value=shortest, max_value=longest),
        between("letter_share", letters, few_letters, min_value=params.min_letter_share),
        between("replacement_share", damage, decoding, max_value=params.max_replacement_share),
        between("n_nul", "no NUL character", f"{decoding}, or remove binary files", max_value=0),
        values("BeUnique", "normalised", unique, copies, mostly=params.min_unique_share),
    ]


def require_success(report: Mapping[str, Any], what: str, last_line: str) -> None:
    """Raise CheckFailed if an expectation in a stage's report failed.

    In the message, `what` names the checked data, such as `the documents`; `last_line` comes last.
    """
    lines = []
    for result in report["expectations"]:
        if result["success"]:
            continue
        if result["unexpected"] is None:  # the expectation checks one value, not many rows
            line = f"{result['what']}: found {result['observed']:,}, expected {result['expected']}"
        else:
            examples = ", ".join(
                f"{row['source']} {row['id']} ({row['value']})" for row in result["examples"]
            )
            broken = f"{result['unexpected']:,} of {result['rows']:,} {result['table']}"
            line = f"expected: {result['description']}; {broken} do not fulfil this expectation, "
            line += f"such as {examples}"
        lines.append(f"  {line}; {result['advice']}\n")
    if lines:
        failed = f"{what} fail {len(lines)} of {len(report['expectations'])} expectations"
        raise CheckFailed(f"{failed}:\n{''.join(lines)}{last_line}")


# --- running Great Expectations


def check_expectations(run_name: str, tables: Sequence[Table], docs: Path) -> list[dict[str, Any]]:
    """Check the tables, write Data Docs into `docs`, and return the result of each expectation.

    Data Docs show `run_name`. Raises NotAllowed if the files in `docs` differ from their manifest.
    """
    import great_expectations as gx

    # Hide GX's traceback when the disk is full: the stage reports this error in one sentence.
    logging.getLogger("great_expectations.render.renderer.site_builder").setLevel(logging.CRITICAL)
    with atomic_folder(docs, kind="data docs") as temporary:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        context.variables.plugins_directory = str(_PLUGINS)
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(temporary)}
        site = {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": store,
        }
        context.add_data_docs_site("data_docs", site)
        results = [result for table in tables for result in _run_checkpoint(context, run_name, table)]
        _make_offline(temporary, run_name, results)
    return results


def _run_checkpoint(context: Any, run_name: str, table: Table) -> list[dict[str, Any]]:
    import great_expectations as gx
    import pandas as pd
    from great_expectations.core.run_identifier import RunIdentifier

    data = context.data_sources.add_pandas(table.name)
    definition = gx.ValidationDefinition(
        name=table.name,
        data=data.add_dataframe_asset("table").add_batch_definition_whole_dataframe("all rows"),
        suite=context.suites.add(gx.ExpectationSuite(name=table.name, expectations=table.suite)),
    )
    checkpoint = gx.Checkpoint(
        name=table.name,
        validation_definitions=[context.validation_definitions.add(definition)],
        actions=[gx.checkpoint.UpdateDataDocsAction(name="data_docs", site_names=["data_docs"])],
        result_format={
            "result_format": "SUMMARY",
            "unexpected_index_column_names": ["id", "source"],
            "partial_unexpected_count": _EXAMPLES,
        },
    )
    # GX does not escape values: HTML in a document would become part of the page.
    rows = pd.DataFrame([_convert_strings(row, html.escape) for row in table.rows])
    run = context.checkpoints.add(checkpoint).run(
        batch_parameters={"dataframe": rows}, run_id=RunIdentifier(run_name=run_name)
    )
    # The checkpoint has one validation definition, so it has exactly one result.
    (validation,) = run.run_results.values()
    return [_result(table, each) for each in validation.to_json_dict()["results"]]


def _convert_strings(row: Mapping[str, Any], convert: Callable[[str], str]) -> dict[str, Any]:
    return {key: convert(value) if isinstance(value, str) else value for key, value in row.items()}


def _result(table: Table, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of one expectation for the report, without GX's times and run ids."""
    config, found = result["expectation_config"], result["result"]
    if "unexpected_count" not in found and "observed_value" not in found:
        raise RuntimeError(f"GX could not check {config['type']}: {result['exception_info']}")
    column = config["kwargs"]["column"]
    rows = found.get("partial_unexpected_index_list", [])
    examples = [{"id": row["id"], "source": row["source"], "value": row[column]} for row in rows]
    meta = dict(config["meta"])  # texts for messages, such as `advice`
    if result["success"]:
        del meta["advice"]
    return {
        "table": table.name,
        "rows": len(table.rows),
        "expectation": config["type"],
        "description": config["description"],
        "column": column,
        "success": result["success"],
        "observed": found.get("observed_value"),
        "unexpected": found.get("unexpected_count"),
        "examples": [_convert_strings(example, html.unescape) for example in examples],
        **meta,
    }


def _make_offline(docs: Path, run_name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Remove links to other servers from the pages in `docs`, and write an index page."""
    from jinja2 import Environment, FileSystemLoader

    for page in docs.rglob("*.html"):
        page.write_text(_REMOTE.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    # Delete GX's fonts, logos and videos: the loop above has removed the HTML that used them.
    shutil.rmtree(docs / "static", ignore_errors=True)
    pages = []
    for page in sorted((docs / "validations").rglob("*.html")):
        path = page.relative_to(docs)  # starts with validations/<name of the table>/
        of_table = [result for result in results if result["table"] == path.parts[1]]
        failed = [result["description"] for result in of_table if not result["success"]]
        pages.append({"name": path.parts[1], "path": path, "of": len(of_table), "failed": failed})
    template = Environment(loader=FileSystemLoader(_PLUGINS), autoescape=True).get_template("index.html.j2")
    style = (_PLUGINS / "custom_data_docs/styles/data_docs_custom_styles.css").read_text()
    index = template.render(run_name=run_name, pages=pages, style=style)
    (docs / "index.html").write_text(index, encoding="utf-8")
