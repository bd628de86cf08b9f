"""A data set in the hub's form becomes documents in its order; a hub that is not there is one sentence."""

import hashlib
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.sections import read_yaml
from compactgpt.config import HubCorpus, parse_params
from compactgpt.data import hub
from compactgpt.data.documents import read_row_group, row_groups
from compactgpt.data.hub_texts import HubReader
from compactgpt.data.sources import Limits, collect

ROOT = Path(__file__).parents[2]
TREE = read_yaml(ROOT / "params.yaml")
SHA = "0123456789abcdef0123456789abcdef01234567"
SET = {
    "repo": "owner/name",
    "config": None,
    "splits": ["train"],
    "text_column": "text",
    "revision": SHA,
    "licence": "MIT",
}


def params(mirror, **changes):
    entry = SET | changes
    tree = {"name": "tiny", "mirror": mirror and str(mirror), "sets": {"tiny": entry}}
    return HubCorpus.model_validate(tree, strict=False)


@pytest.fixture
def mirror(tmp_path):
    """A repository as the hub keeps it: a card that names the files of two configurations, parquet shards."""
    folder = tmp_path / "mirror"
    (folder / "main").mkdir(parents=True)
    rows = [f"Row {n} says something of its own." for n in range(30)]
    for number in range(3):
        table = pa.table({"id": list(range(10)), "text": rows[10 * number : 10 * number + 10]})
        pq.write_table(table, folder / f"main/train-{number:05d}-of-00003.parquet", row_group_size=4)
    pq.write_table(pa.table({"text": ["Held out, the one."]}), folder / "main/test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "  - split: test\n    path: main/test-*\n---\n"
    )
    return folder


def make(tmp_path, reader, name="documents", limits=None):
    report = collect(reader, tmp_path / name, limits or Limits(200), state=tmp_path / "state")
    folder = tmp_path / name
    return report, [each for group in row_groups(folder) for each in read_row_group(group)]


def test_rows_are_documents_in_the_order_of_splits_and_files(tmp_path, mirror):
    reader = HubReader(params(mirror, config="main", splits=["train", "test"]), 1000)
    report, documents = make(tmp_path, reader)
    assert [each.text for each in documents] == [
        *(f"Row {n} says something of its own." for n in range(30)),
        "Held out, the one.",
    ]
    assert documents[0].source == "owner/name/train:1"
    assert documents[29].source == "owner/name/train:30"
    assert documents[30].source == "owner/name/test:1"
    assert [(each["name"], each["version"], each["documents"]) for each in report["sources"]] == [
        ("owner/name/train", SHA, 30),
        ("owner/name/test", SHA, 1),
    ]


def breaking(reader, after):
    """The reader, with a line that dies after so many pieces."""

    class Breaking(HubReader):
        def read(self, place):
            for number, piece in enumerate(super().read(place)):
                if number == after:
                    raise ConnectionError("the line is dead")
                yield piece

    reader.__class__ = Breaking
    return reader


ARTICLES = [
    *("", " = One = \n", "", " Words of one .\n", " = = Part = = \n", " More of one .\n"),
    *(" = Two = \n", " Words of two .\n", " = Three three = \n", " End .\n"),
]


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, ["a b", "c d e", "", "f", "g h", "i"], ["a b", "c d e", "f", "g h", "i"]),
        ({"separator": "\n\n"}, ["a\n\nb\n\n\n\nc", "d", "e\n\nf", "", "g"], [*"abcdefg"]),
        (
            {"opens_document": TREE["download"]["hub"]["sets"]["wikitext-103"]["opens_document"]},
            ARTICLES,
            ["".join(ARTICLES[1:6]), "".join(ARTICLES[6:8]), "".join(ARTICLES[8:])],
        ),
    ],
)
def test_rows_are_taken_cut_or_joined_and_a_broken_stream_goes_on_at_every_piece(
    tmp_path, changes, rows, expected
):
    folder = tmp_path / "mirror"
    folder.mkdir()
    pq.write_table(pa.table({"text": rows[:4]}), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": rows[4:]}), folder / "train-00001-of-00002.parquet")
    limits = Limits(1)  # a document a shard
    report, documents = make(tmp_path, HubReader(params(folder, **changes), 1000), limits=limits)
    assert [each.text for each in documents] == expected
    for after in range(len(expected) + 1):
        with pytest.raises(ConnectionError):
            make(tmp_path, breaking(HubReader(params(folder, **changes), 1000), after), "again", limits)
        again, resumed = make(tmp_path, HubReader(params(folder, **changes), 1000), "again", limits)
        assert (again, resumed) == (report, documents)


def test_a_set_that_is_not_as_params_say_is_one_sentence(tmp_path, mirror):
    for changes, kind, says in [
        ({"config": "other"}, BadConfig, r"config 'other' not found|BuilderConfig 'other' not found"),
        ({"config": "main", "splits": ["dev"]}, BadConfig, r"[Bb]ad split: dev"),
        (
            {"config": "main", "text_column": "content"},
            BadData,
            r"owner/name/train, row 1: found columns \['id', 'text'\] .*text_column \('content'\)",
        ),
        ({"config": "main", "text_column": "id"}, BadData, r"row 1: found int where text"),
    ]:
        with pytest.raises(kind, match=says) as caught:
            make(tmp_path, HubReader(params(mirror, **changes), 1000))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadData, match=r"owner/name/train:1 is longer than 0 MB .*max_row_megabytes"):
        make(tmp_path, HubReader(params(mirror, config="main"), 10))
    with pytest.raises(MissingInput, match="there is no folder"):
        make(tmp_path, HubReader(params(mirror / "gone"), 1000))
    path = mirror / "main/train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match=r"is damaged, or was cut short|can't be read"):
        make(tmp_path, HubReader(params(mirror, config="main"), 1000))


def test_a_set_without_a_commit_is_the_one_by_the_hash_of_its_text(tmp_path, mirror):
    rows = [*(f"Row {n} says something of its own." for n in range(30)), "Held out, the one."]
    branch = {"config": "main", "splits": ["train", "test"], "revision": "refs/convert/parquet"}
    for text in ("".join(rows), "".join(rows[1:])):
        reader = HubReader(params(mirror, **branch, sha256=hashlib.sha256(text.encode()).hexdigest()), 1000)
        if text.startswith(rows[0]):
            assert [each.text for each in make(tmp_path, reader)[1]] == rows
        else:
            with pytest.raises(BadData, match=r"the text of owner/name has SHA-256 .* expects"):
                make(tmp_path, reader)


def test_a_set_without_a_commit_is_refused_before_the_hub_is_asked(tmp_path):
    with pytest.raises(BadConfig, match=r"download\.hub\.sets\.tiny\.revision is empty.*git ls-remote"):
        make(tmp_path, HubReader(params(None, revision=None), 1000))


def test_a_hub_that_is_forbidden_is_one_sentence_at_once(tmp_path):
    # tests/conftest.py sets HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(
        Unreachable, match=r"the hub can't be reached for owner/name .*download\.hub\.mirror"
    ) as caught:
        make(tmp_path, HubReader(params(None), 1000))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_a_hub_that_does_not_answer_is_one_sentence_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # nobody listens there any more
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(Unreachable, match="check the network, or mend it"):
        hub.require_on_hub("dataset", "owner/name", SHA, "mend it")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"revision": "main"}, r"revision"),
        ({"revision": "refs/convert/parquet"}, "is a branch, which moves: give the sha256"),
        ({"separator": "x", "opens_document": "y"}, "one of the two at most"),
        ({"opens_document": "("}, "no regular expression"),
    ],
)
def test_a_set_that_cannot_work_is_refused_before_anything_runs(changes, says):
    sets = {"tiny": SET | changes}
    part = TREE["download"] | {"hub": {"name": "tiny", "mirror": None, "sets": sets}}
    with pytest.raises(BadConfig, match=says):
        parse_params(TREE | {"download": part})


def test_every_set_that_is_shipped_is_pinned():
    for name, entry in TREE["download"]["hub"]["sets"].items():
        assert entry.get("sha256") or len(entry["revision"]) == 40, name


def test_a_name_without_a_set_is_refused():
    part = TREE["download"] | {"hub": TREE["download"]["hub"] | {"name": "opnwebtext"}}
    with pytest.raises(BadConfig, match=r"name 'opnwebtext' has no entry in sets"):
        parse_params(TREE | {"download": part})
