"""Good text passes every expectation, bad text is named, and the same text gives the same report."""

import json
import re
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, CheckFailed
from compactgpt.common.storage import atomic_folder, write_text
from compactgpt.config import Validation
from compactgpt.data.documents import Document, new_document, write_shards
from compactgpt.data.validation import document_row, require_success, validate
from stages.validation import app
from tests.support.corpora import download_params, write_corpus
from tests.support.data_docs import compiled_once  # noqa: F401

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]
BOUNDS = Validation(
    min_documents=10,
    min_characters=20,
    max_characters=100,
    min_total_megabytes=0.0005,
    min_letter_share=0.5,
    max_replacement_share=0.01,
    min_unique_share=0.9,
    mostly=0.9,
    max_rows=1000,
)
GOOD = [new_document(f"Some words of document number {n} here.", f"a/{n}") for n in range(30)]
TOTAL = "expect_column_max_to_be_between"
BETWEEN = "expect_column_values_to_be_between"
UNIQUE = "expect_column_values_to_be_unique"
# What is wrong, documents that are wrong in that way only, and the expectation that finds just them.
SPOILED = {
    "short": (["short {}"], BETWEEN, "n_characters"),
    "figures": (["a1234567890 1234567890 {}"], BETWEEN, "letter_share"),
    "decoding": (["Wrongly d\ufffdcoded t\ufffdxt {}"], BETWEEN, "replacement_share"),
    "nul": (["Some text with a NUL \0 {}"], BETWEEN, "n_nul"),
    "twin": (["Fair words are here {}", "FAIR  WORDS are here {}"], UNIQUE, "normalised"),
}


def planted(kind, count=3):
    return [new_document(text.format(n), kind) for text in SPOILED[kind][0] for n in range(count)]


def write_folder(folder, documents):
    facts = {"documents": len(documents), "bytes": sum(len(each.text.encode()) for each in documents)}
    with atomic_folder(folder, facts) as temporary:
        list(write_shards(temporary, documents))


def check(tmp_path, documents, bounds=BOUNDS):
    write_folder(tmp_path / "documents", documents)
    return validate(tmp_path / "documents", tmp_path / "docs", bounds)


def failures(report):
    failed = [each for each in report["expectations"] if not each["success"]]
    return {(each["expectation"], each["column"]): each for each in failed}


def test_a_row_describes_a_hand_worked_text():
    row = document_row(new_document("Ab \n é1\0 \ufffd!", "x"))
    assert (row["n_characters"], row["n_nul"]) == (11, 1)
    assert (row["letter_share"], row["replacement_share"]) == (3 / 7, 1 / 11)
    assert (row["excerpt"], row["id_is_hash"]) == ("Ab é1\0 \ufffd!", True)
    twins = [document_row(new_document(text, "x"))["normalised"] for text in ("A  b", "ab\n", "abc")]
    assert twins[0] == twins[1] != twins[2]


def test_each_kind_of_bad_text_fails_its_expectation_and_no_other(tmp_path):
    bounds = BOUNDS.model_copy(update={"mostly": 1.0, "min_unique_share": 1.0})
    fair = "Some text of fair length"
    documents = [*GOOD, *(each for kind in SPOILED for each in planted(kind))]
    documents += [new_document(" " * 30, "blank"), Document("Q" * 32, f"{fair} one", "form")]
    documents += [Document("0" * 32, f"{fair} two", "hash"), Document(GOOD[0].id, f"{fair} 3", "repeated")]
    found = {
        key: (each["unexpected"], {row["source"] for row in each["examples"]})
        for key, each in failures(check(tmp_path, documents, bounds)).items()
    }
    expected = {(expectation, column): (3, {kind}) for kind, (_, expectation, column) in SPOILED.items()}
    expected[UNIQUE, "normalised"] = (6, {"twin"})
    expected[BETWEEN, "letter_share"] = (4, {"figures"})  # a blank text has no letter either
    expected["expect_column_values_to_not_be_null", "excerpt"] = (1, {"blank"})
    expected["expect_column_values_to_match_regex", "id"] = (1, {"form"})
    expected["expect_column_values_to_be_in_set", "id_is_hash"] = (3, {"form", "hash", "repeated"})
    expected[UNIQUE, "id"] = (2, {"a/0", "repeated"})
    for name in ("repeated_ids", "wrong_ids"):  # counted in the whole corpus
        expected[TOTAL, name] = (None, set())
    assert found == expected


def test_a_failure_is_reported_the_same_way_twice_with_count_and_three_documents(tmp_path):
    documents = [*GOOD, *planted("short", 4)]
    report, again = check(tmp_path, documents), check(tmp_path, documents)
    assert report == again
    ids = [new_document(f"short {n}", "").id for n in range(3)]
    examples = failures(report)[BETWEEN, "n_characters"]["examples"]
    assert examples == [{"id": each, "source": "short", "value": 7} for each in ids]
    expected = r"fail 1 of 14 .* 4 of 34 documents do not fulfil this expectation, such as short \w+ \(7\)"
    with pytest.raises(CheckFailed, match=f"(?s){expected}"):
        require_success(report, "the documents", "change the bounds")


def test_a_large_corpus_is_counted_exactly_and_checked_by_a_sample_that_keeps_twins_together(tmp_path):
    documents = [new_document(f"Some words of document number {n} here.", f"a/{n}") for n in range(1200)]
    documents += [new_document(f"SOME words of  document number {n} here.", f"twin/{n}") for n in range(400)]
    documents.append(documents[5])
    report = check(tmp_path, documents, BOUNDS.model_copy(update={"max_rows": 300}))
    assert report["documents"] == 1601
    assert report["bytes"] == sum(len(each.text) for each in documents)
    assert (report["repeated_ids"], report["wrong_ids"]) == (1, 0)
    assert 230 < report["rows"] < 370
    twins = failures(report)[UNIQUE, "normalised"]
    # 800 of 1,600 documents have a twin; a sample by id would find a few of them only.
    assert 0.4 < twins["unexpected"] / report["rows"] < 0.6


def test_a_sample_without_documents_is_one_message(tmp_path):
    texts = (f"Some words of document number {n} here." for n in count())
    text = next(each for each in texts if document_row(new_document(each, ""))["normalised"] > "f")
    copies = [new_document(text + " " * n, "copy") for n in range(1200)]
    bounds = BOUNDS.model_copy(update={"max_characters": 2000})
    with pytest.raises(BadConfig, match=r"sample of 1,200 documents is empty: .*\.max_rows to 1200, which"):
        check(tmp_path, copies, bounds)
    report = check(tmp_path, copies, bounds.model_copy(update={"max_rows": 1200}))
    assert list(failures(report)) == [(UNIQUE, "normalised")]


INIT_CORPUS = ", or run `compactgpt init-corpus corpus/`, which sets limits that fit"


@pytest.mark.parametrize(
    ("files", "found", "advice"),
    [
        ({"a.txt": "A"}, 1, "if the corpus is one file, set download.files.split, otherwise add text"),
        ({f"{n}.txt": "A" for n in range(30)}, 1, "left out by download: 29 duplicate; add text"),
        ({"a.csv": 'text\nA\nA\n" "\n'}, 1, "left out by download: 1 duplicate, 1 empty; add text"),
        ({"a.txt": "A", "b.txt": "B"}, 2, "add text"),
    ],
)
def test_for_too_few_documents_the_message_has_what_was_left_out_and_what_to_do(
    tmp_path, files, found, advice
):
    for name, content in files.items():
        write_text(tmp_path / "corpus" / name, content)
    write_corpus(tmp_path, download_params(corpus="files"))
    report = validate(tmp_path / "documents", tmp_path / "docs", BOUNDS)
    with pytest.raises(CheckFailed) as failed:
        require_success(report, "the documents", "")
    line = f"  documents: found {found}, expected at least 10; {advice}{INIT_CORPUS}\n"
    assert line in str(failed.value)


# --- the stage and Data Docs


def test_the_stage_says_what_was_expected_and_writes_the_report_before_it_fails(tmp_path, monkeypatch):
    write_folder(tmp_path / "data/documents", GOOD[:1])
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("compactgpt.tracking.mlflow_logger.start_logger", lambda folder: None)
    done = CliRunner().invoke(app, ["--tracker", "mlflow"])
    assert done.exit_code == CheckFailed.exit_code
    what = "  documents: found 1, expected at least 1,000; let download take more of the corpus\n"
    assert what in done.output
    assert done.output.endswith("reports/validation.json has the complete result\n")
    assert "Data Docs: data/data_docs/documents/index.html" in done.output
    assert not json.loads(Path("reports/validation.json").read_text())["success"]
    (logged,) = tmp_path.rglob(".state/tracking/*/*/artifacts/data_docs/documents/index.html")
    assert "2 of 4 met" in logged.read_text()
    assert "validation of 1 documents of docstrings" in logged.read_text()


def test_data_docs_need_no_network_and_text_of_a_corpus_never_becomes_markup(tmp_path):
    odd = '<script>alert(1)</script><img src=x onerror=alert(2)> & "'
    report = check(tmp_path, [*GOOD, Document(odd, "Some text of fair length.", odd)])
    (example,) = failures(report)["expect_column_values_to_match_regex", "id"]["examples"]
    assert example == {"id": odd, "source": odd, "value": odd}
    pages = {page: page.read_text() for page in (tmp_path / "docs").rglob("*.html")}
    assert len(pages) == 5
    for page, text in pages.items():
        remote = re.search(r"""(?:src|<link[^>]*href)=["']?https?:|url\(["']?https?:|<script""", text)
        assert not remote, page
        assert ".text-success { color: #1a7f37; }" in text  # the project's style sheet
        assert "<img src=x" not in text
    assert "alert(1)&lt;/script&gt;" in "".join(pages.values())
