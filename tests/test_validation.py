"""The suite passes good text, names what is wrong with bad text, and reports the same thing every time."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.config import Validation
from compactgpt.documents import Document, Stored, new_document, write_documents
from compactgpt.errors import BadData, CheckFailed
from compactgpt.progress import silent
from compactgpt.storage import atomic_folder
from compactgpt.validation import _read, document_row, require_success, validate
from stages.validation import app
from tests.pages import compiled_once  # noqa: F401

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
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
WORDS = ("the documents", "change params.yaml (validation)")
GOOD = [new_document(f"Some words of document number {n} here.", f"a/{n}") for n in range(30)]


def make(folder, documents):
    facts = {"documents": len(documents), "bytes": sum(len(each.text.encode()) for each in documents)}
    with atomic_folder(folder, facts) as temporary:
        write_documents(temporary, documents)
    return folder


def judge(tmp_path, documents, bounds=BOUNDS):
    return validate(make(tmp_path / "documents", documents), tmp_path / "docs", bounds)


def row_of(document, cut=None):
    raw = document.text.encode()
    parts = [raw] if cut is None else [raw[:cut], raw[cut:]]
    return document_row(Stored(document.id, document.source, [memoryview(part) for part in parts]))


def failures(report):
    failed = [each for each in report["expectations"] if not each["success"]]
    return {(each["expectation"], each["column"]): each for each in failed}


def test_a_row_describes_a_hand_worked_text():
    row = row_of(new_document("Ab \n é1\0 \ufffd!", "x"))
    assert (row["n_characters"], row["n_bytes"], row["n_nul"]) == (11, 14, 1)
    assert row["letter_share"] == 3 / 7
    assert row["replacement_share"] == 1 / 11
    assert row["excerpt"] == "Ab é1\0 \ufffd!"
    assert row["id_is_hash"]
    twins = [row_of(new_document(text, "x"))["normalised"] for text in ("A  b", "ab\n", "abc")]
    assert twins[0] == twins[1] != twins[2]
    assert row_of(new_document(" \n", "x"))["excerpt"] is None
    assert not row_of(Document("00" * 16, "text", "x"))["id_is_hash"]
    for cut in (0, 1, 4, 7, 13):  # bytes, between characters
        assert row_of(new_document("Ab \n é1\0 \ufffd!", "x"), cut) | {"excerpt": ""} == row | {"excerpt": ""}


def test_good_text_passes_every_expectation(tmp_path):
    report = judge(tmp_path, GOOD)
    assert report["success"]
    assert report["documents"] == 30
    assert report["bytes"] == sum(len(each.text) for each in GOOD)
    assert len(report["expectations"]) >= 8
    assert (tmp_path / "docs" / "index.html").exists()
    require_success(report, *WORDS)


BETWEEN = "expect_column_values_to_be_between"
UNIQUE = "expect_column_values_to_be_unique"
FAIR = "Some text of fair length"
# What is wrong, documents that are wrong in that way only, and the expectation that must find just them.
SPOILED = {
    "short": (["short {}"], BETWEEN, "n_characters"),
    "figures": (["a1234567890 1234567890 {}"], BETWEEN, "letter_share"),
    "decoding": (["Wrongly d\ufffdcoded t\ufffdxt {}"], BETWEEN, "replacement_share"),
    "nul": (["Some text with a NUL \0 {}"], BETWEEN, "n_nul"),
    "twin": (["Fair words are here {}", "FAIR  WORDS are here {}"], UNIQUE, "normalised"),
}


def planted(kinds, count=3):
    return [
        new_document(text.format(n), kind)
        for kind in kinds
        for text in SPOILED[kind][0]
        for n in range(count)
    ]


def test_each_kind_of_bad_text_fails_its_expectation_and_no_other(tmp_path):
    bounds = BOUNDS.model_copy(update={"mostly": 1.0, "min_unique_share": 1.0})
    blank = new_document(" " * 30, "blank")
    extra = [Document("Q" * 32, f"{FAIR} one", "form"), Document("0" * 32, f"{FAIR} two", "hash")]
    documents = [*GOOD, *planted(SPOILED), blank, *extra, Document(GOOD[0].id, f"{FAIR} three", "repeated")]
    found = {
        key: (each["unexpected"], {row["source"] for row in each["examples"]})
        for key, each in failures(judge(tmp_path, documents, bounds)).items()
    }
    expected = {(SPOILED[kind][1], SPOILED[kind][2]): (3, {kind}) for kind in SPOILED}
    expected[UNIQUE, "normalised"] = (6, {"twin"})
    expected[BETWEEN, "letter_share"] = (4, {"figures"})  # a blank text has no letter either
    expected["expect_column_values_to_not_be_null", "excerpt"] = (1, {"blank"})
    expected["expect_column_values_to_match_regex", "id"] = (1, {"form"})
    expected["expect_column_values_to_be_in_set", "id_is_hash"] = (3, {"form", "hash", "repeated"})
    expected[UNIQUE, "id"] = (2, {"a/0", "repeated"})
    for name in ("repeated_ids", "wrong_ids"):  # exact, over the whole corpus
        expected["expect_column_sum_to_be_between", name] = (None, set())
    assert found == expected


def test_a_small_corpus_of_long_documents_fails_its_sizes(tmp_path):
    documents = [new_document("long " * 5 + "long " * 20 * (n == 0) + str(n), f"a/{n}") for n in range(8)]
    found = failures(judge(tmp_path, documents))
    assert found["expect_column_sum_to_be_between", "documents"]["observed"] == 8
    assert found["expect_column_sum_to_be_between", "bytes"]["observed"] == 8 * 26 + 100
    assert found[BETWEEN, "n_characters"]["examples"][0]["value"] == 126


def test_a_few_documents_may_be_bad(tmp_path):
    assert judge(tmp_path, [*GOOD, *planted(["short"])])["success"]


def test_a_failure_is_told_the_same_way_twice_with_count_and_three_documents(tmp_path):
    documents = [*GOOD, *planted(["short"], 4)]
    report, again = judge(tmp_path, documents), judge(tmp_path, documents)
    assert json.dumps(report, allow_nan=False) == json.dumps(again, allow_nan=False)
    failed = failures(report)[BETWEEN, "n_characters"]
    assert failed["unexpected"] == 4
    assert failed["examples"] == [
        {"id": new_document(f"short {n}", "").id, "source": "short", "value": 7} for n in range(3)
    ]
    with pytest.raises(CheckFailed) as caught:
        require_success(report, *WORDS)
    message = str(caught.value)
    assert "the documents fail 1 of 14 expectations" in message
    assert f"4 of 34 rows break it, such as short {new_document('short 0', '').id} (7)" in message
    assert "params.yaml (validation)" in message


def test_a_large_corpus_is_summed_exactly_and_judged_by_a_sample_that_keeps_twins_together(tmp_path):
    documents = [new_document(f"Some words of document number {n} here.", f"a/{n}") for n in range(1200)]
    documents += [new_document(f"SOME words of  document number {n} here.", f"twin/{n}") for n in range(400)]
    documents.append(documents[5])
    report = judge(tmp_path, documents, BOUNDS.model_copy(update={"max_rows": 300}))
    assert report["documents"] == 1601
    assert report["bytes"] == sum(len(each.text) for each in documents)
    assert (report["repeated_ids"], report["wrong_ids"]) == (1, 0)
    assert 230 < report["rows"] < 370
    twins = failures(report)[UNIQUE, "normalised"]
    # 800 of 1,600 documents have a twin; a sample by id would find a few of them only.
    assert 0.4 < twins["unexpected"] / report["rows"] < 0.6
    _, rows = _read(make(tmp_path / "again", documents[::-1]), 300, silent)
    assert len(rows) == report["rows"]


def test_a_long_document_is_judged_as_if_it_were_whole(tmp_path, monkeypatch):
    long = [new_document("Some words é\0 of one \ufffd long document. " * n, f"long/{n}") for n in (90, 91)]
    found = []
    for part_bytes in (2**22, 100):
        monkeypatch.setattr("compactgpt.documents.PART_BYTES", part_bytes)
        folder = make(tmp_path / str(part_bytes), [*GOOD, *long])
        found += [_read(folder, rows, silent) for rows in (1000, 20)]
    assert found[:2] == found[2:]
    sums, rows = found[0]
    assert (sums["wrong_ids"], sums["documents"], len(rows)) == (0, 32, 32)
    assert 0 < len(found[1][1]) < 32


def test_altered_documents_are_refused(tmp_path):
    folder = make(tmp_path / "documents", GOOD)
    (folder / "documents-00000.parquet").write_bytes(b"x")
    with pytest.raises(BadData, match=r"documents-00000\.parquet has 1 bytes"):
        validate(folder, tmp_path / "docs", BOUNDS)


def test_the_door_writes_the_report_before_it_fails(tmp_path, monkeypatch):
    make(tmp_path / "data/documents", GOOD)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == CheckFailed.exit_code
    assert "expect_column_sum_to_be_between of documents (min_value 1000.0): found 30" in done.output
    assert not json.loads(Path("reports/validation.json").read_text())["success"]
    assert Path("data/data_docs/documents/index.html").exists()
