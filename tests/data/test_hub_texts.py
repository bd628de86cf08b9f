"""A data set of the hub becomes documents in its order, and a stopped run resumes inside it."""

import hashlib
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compactgpt.common.console import silent
from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import write_bytes
from compactgpt.data.hub_texts import hub_corpus
from tests.support.corpora import DOWNLOAD, download_params, write_corpus

SHA = "0123456789abcdef0123456789abcdef01234567"
SET = {"repo": "owner/name", "config": "main", "splits": ["train"], "text_column": "text"}
SET |= {"revision": SHA, "licence": "MIT"}
ROWS = [f"Row {n} says something of its own." for n in range(30)]
HELD_OUT = "Held out, the one."
CARD = (
    "---\nconfigs: [{config_name: main, data_files: "
    "[{split: train, path: main/train-*}, {split: test, path: main/test-*}]}]\n---\n"
)


def sha256(texts):
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def params(mirror, max_row_megabytes=32, **changes):
    part = {"name": "tiny", "mirror": mirror and str(mirror), "sets": {"tiny": SET | changes}}
    return download_params(corpus="hub", hub=part, max_row_megabytes=max_row_megabytes)


def write_mirror(folder, *shards):
    """A repository as the hub keeps it: a card that names the files of a configuration, parquet shards."""
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number, rows in enumerate(shards):
        table = pa.table({"id": range(len(rows)), "text": rows})
        pq.write_table(table, folder / f"main/train-{number}.parquet", row_group_size=4)
    pq.write_table(pa.table({"text": [HELD_OUT]}), folder / "main/test-0.parquet")
    return folder


@pytest.fixture
def mirror(tmp_path):
    return write_mirror(tmp_path / "mirror", ROWS[:10], ROWS[10:20], ROWS[20:])


def test_rows_are_documents_in_the_order_of_splits_and_files(tmp_path, mirror):
    changes = {"splits": ["train", "test"], "sha256": sha256([*ROWS, HELD_OUT])}
    report, documents = write_corpus(tmp_path, params(mirror, **changes))
    assert [each.text for each in documents] == [*ROWS, HELD_OUT]
    sources = [documents[number].source for number in (0, 29, 30)]
    assert sources == ["owner/name/train:1", "owner/name/train:30", "owner/name/test:1"]
    parts = [(each["name"], each["version"], each["documents"]) for each in report["sources"]]
    assert parts == [("owner/name/train", SHA, 30), ("owner/name/test", SHA, 1)]


ARTICLES = [
    *("", " = One = \n", "", " Words of one .\n", " = = Part = = \n", " More of one .\n"),
    *(" = Two = \n", " Words of two .\n", " = Three three = \n", " End .\n"),
]
JOINED = ["", "".join(ARTICLES[1:6]), "".join(ARTICLES[6:8]), "".join(ARTICLES[8:])]
OPENS = DOWNLOAD["hub"]["sets"]["wikitext-103"]["opens_document"]
PAIRS = ["a\n\nb\n\n\n\nc", "d", "e\n\nf", "", "g"]


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({"config": None}, ["a b", "c", "", "d", "e"], ["a b", "c", "", "d", "e"]),
        ({"separator": "\n\n"}, PAIRS, ["a", "b", "", "c", "d", "e", "f", "", "g"]),
        ({"separator": "\n\n", "join_characters": 3}, PAIRS, ["a\n\nb", "\n\nc", "d", "e\n\nf", "", "g"]),
        ({"opens_document": OPENS}, ARTICLES, JOINED),
    ],
)
def test_rows_are_taken_split_or_joined_and_reading_resumes_after_every_text(
    tmp_path, changes, rows, expected
):
    mirror = write_mirror(tmp_path / "mirror", rows[:4], rows[4:])
    changes = {"splits": ["train", "test"], "sha256": sha256([*rows, HELD_OUT]), **changes}
    corpus = hub_corpus(params(mirror, **changes), silent)
    texts = list(corpus.read(None))
    assert [each.text for each in texts] == [*expected, HELD_OUT]
    for number, text in enumerate(texts, 1):
        position = json.loads(json.dumps(text.position))  # as a note on disk
        rest = list(corpus.read(position))
        assert [each[:3] for each in rest] == [each[:3] for each in texts[number:]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": "other"}, BadConfig, r"config 'other' not found|BuilderConfig 'other' not found"),
        ({"splits": ["dev"]}, BadConfig, r"[Bb]ad split: dev"),
        ({"text_column": "body"}, BadData, r"name/train, row 1: found columns \['id', 'text'\], expected"),
        ({"text_column": "id"}, BadData, r"row 1: found int, expected text in .*'id'.* \S+\.text_column"),
    ],
)
def test_a_data_set_that_is_not_as_params_say_is_one_message(tmp_path, mirror, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        write_corpus(tmp_path, params(mirror, **changes))
    assert "\n" not in str(caught.value)


def test_a_mirror_that_is_missing_or_damaged_and_a_long_row_are_named(tmp_path, mirror):
    with pytest.raises(MissingInput, match="there is no folder"):
        write_corpus(tmp_path, params(mirror / "gone"))
    path = mirror / "main/train-1.parquet"
    pq.write_table(pa.table({"id": [1], "text": ["x" * 1_000_001]}), path)
    with pytest.raises(BadData, match=r"owner/name/train, row 11 is longer than 1 MB .*max_row_megabytes"):
        write_corpus(tmp_path, params(mirror, max_row_megabytes=1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match=r"a file of .*mirror is damaged, or was cut short"):
        write_corpus(tmp_path, params(mirror))


def test_a_data_set_without_a_commit_is_pinned_by_the_hash_of_its_text(tmp_path, mirror):
    branch = "refs/convert/parquet"
    right, wrong = sha256(ROWS), sha256(ROWS[1:])
    _, documents = write_corpus(tmp_path, params(mirror, revision=branch, sha256=right))
    assert [each.text for each in documents] == ROWS
    with pytest.raises(BadData, match=rf"the text of .*mirror has SHA-256 {right}, .* expects {wrong}"):
        write_corpus(tmp_path, params(mirror, revision=branch, sha256=wrong))
    with pytest.raises(BadConfig, match=r"download\.hub\.sets\.tiny\.revision is empty.*git ls-remote"):
        write_corpus(tmp_path, params(None, revision=None))


@pytest.mark.parametrize("kind", ["mirror", "file"])
def test_a_local_copy_is_pinned_by_the_hash_of_its_text(tmp_path, mirror, kind):
    """DVC watches no copy outside of the project, and the commit in params.yaml says nothing of the copy."""
    file = tmp_path / "a.txt"
    file.write_text("".join(ROWS))
    copy = mirror if kind == "mirror" else file
    with_copy = partial(params, mirror) if kind == "mirror" else partial(params, None, file=str(file))
    advice = rf"write `sha256: {sha256(ROWS)}` below download\.hub\.sets\.tiny in params\.yaml"
    with pytest.raises(BadData, match=f"^{copy} is a local copy, .*, {advice}"):
        write_corpus(tmp_path, with_copy())
    assert write_corpus(tmp_path, with_copy(sha256=sha256(ROWS)))[0]["bytes"] == len("".join(ROWS))
    file.write_text("".join(ROWS[1:]))
    pq.write_table(pa.table({"id": range(9), "text": ROWS[11:20]}), mirror / "main/train-1.parquet")
    with pytest.raises(BadData, match=f"the text of {copy} has SHA-256 .* expects {sha256(ROWS)}"):
        write_corpus(tmp_path, with_copy(sha256=sha256(ROWS)))


def test_a_local_copy_of_the_text_is_read_instead_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    content = b"One:\nfirst \xc3\xa9\n\nTwo:\nsecond\n"
    copy = {"file": "corpus/input.txt", "file_url": "https://localhost/input.txt", "separator": "\n\n"}
    copy["sha256"] = hashlib.sha256(content).hexdigest()
    message = r"get the text file: run `curl -fLo corpus/input\.txt https://localhost/input"
    with pytest.raises(Unreachable, match=message):
        write_corpus(tmp_path, params(None, **copy))
    write_bytes(tmp_path / "corpus/input.txt", content)
    _, documents = write_corpus(tmp_path, params(None, **copy))
    assert [each.text for each in documents] == ["One:\nfirst é", "Two:\nsecond\n"]
    assert {each.source for each in documents} == {"owner/name/input.txt:1"}
    (tmp_path / "corpus/input.txt").write_bytes(b"Another text.")
    with pytest.raises(BadData, match=r"the text of corpus/input\.txt has SHA-256 .* expects"):
        write_corpus(tmp_path, params(None, **copy))
