"""A stopped download resumes after its last finished shard, to the same bytes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import verified_manifest, write_bytes, write_json
from compactgpt.config import parse_params
from compactgpt.data.documents import Corpus, Part, Text
from compactgpt.data.sources import Limits
from compactgpt.data.tokenizer import load_encoding
from stages.download import app
from tests.support.corpora import DOWNLOAD, ROOT, collect_in, download_params
from tests.support.tiny_corpus import tokenizer_files

LIMITS = Limits(shard_bytes=300)
TEXTS = [f"Text {n} of a corpus, some words long." * (n % 3) for n in range(60)]
TEXTS[20:20] = TEXTS[1:5]  # repeated within and across shards
KEPT = list(dict.fromkeys(text for text in TEXTS if text))


def numbered(stop_at=None, read=None, identity="v1"):
    """A corpus of two parts; reading raises an error at text `stop_at`; `read` lists what was read."""
    read = [] if read is None else read

    def texts(position):
        for number in range(position or 0, len(TEXTS)):
            if number == stop_at:
                raise ConnectionError
            read.append(number)
            yield Text(TEXTS[number], f"numbered:{number}", number // 40, number + 1, "blank lines")

    return Corpus("numbered", identity, (Part("first"), Part("second", "2", "MIT")), texts)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(tmp_path, number):
    with pytest.raises(ConnectionError):
        collect_in(tmp_path, numbered(number), LIMITS)


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path):
    report, documents = collect_in(tmp_path, numbered(), LIMITS)
    assert [each.text for each in documents] == KEPT
    manifest = verified_manifest(tmp_path / "documents")
    shards = list(manifest["shards"].values())
    assert len(shards) > 5
    assert set(manifest["shards"]) == set(manifest["files"])
    assert all(300 <= shard["bytes"] < 300 + max(map(len, TEXTS)) for shard in shards[:-1])
    assert report["documents"] == len(KEPT) == sum(shard["documents"] for shard in shards)
    assert report["bytes"] == sum(map(len, KEPT)) == sum(each["bytes"] for each in report["sources"])
    assert report["left_out"] == {"empty": TEXTS.count(""), "short": 0, "long": 0, "duplicate": 3}
    second = [each for each in documents if int(each.source.split(":")[1]) >= 40]
    digest = hashlib.sha256(b"".join(bytes.fromhex(each.id) for each in second)).hexdigest()
    kept = {"documents": len(second), "bytes": sum(len(each.text) for each in second), "sha256": digest}
    assert report["sources"][1] == {"name": "second", "version": "2", "licence": "MIT", **kept}
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("stop_at", [0, 3, 24, 63])
def test_a_stopped_download_resumes_to_the_same_bytes(tmp_path, stop_at):
    expected, messages, read = [], [], []
    undisturbed = collect_in(tmp_path / "undisturbed", numbered(), LIMITS, expected.append)
    stop_after(tmp_path, stop_at)
    assert not (tmp_path / "documents").exists()
    assert collect_in(tmp_path, numbered(read=read), LIMITS, messages.append) == undisturbed
    assert files_of(tmp_path / "documents") == files_of(tmp_path / "undisturbed/documents")
    assert messages[-2] == expected[0] == f"numbered: 1 file -> {len(KEPT)} documents by blank lines"
    # What finished shards hold was not read again.
    assert (read[0] > 0) == ("of an earlier `download` are kept" in messages[0]) == (stop_at > 20)


@pytest.mark.parametrize(("identity", "limits"), [("v2", LIMITS), ("v1", Limits(shard_bytes=500))])
def test_another_corpus_or_other_limits_take_over_no_shard(tmp_path, identity, limits):
    stop_after(tmp_path, 63)
    messages = []
    collect_in(tmp_path, numbered(identity=identity), limits, messages.append)
    assert len(messages) == 2  # how the files were cut, and how many documents there are


@pytest.mark.parametrize("shard_bytes", [100, 10**6])
def test_a_subset_is_the_first_documents_whatever_the_shards(tmp_path, shard_bytes):
    size = sum(map(len, KEPT[:7]))
    for limits in (Limits(shard_bytes, max_documents=7), Limits(shard_bytes, max_bytes=size + 5)):
        report, documents = collect_in(tmp_path, numbered(), limits)
        assert [each.text for each in documents] == KEPT[:7]
        assert report["bytes"] == size


def test_texts_of_other_lengths_are_left_out_and_counted(tmp_path):
    report, documents = collect_in(tmp_path, replace(numbered(), lengths=range(37, 38)))
    assert {len(each.text) for each in documents} == {37}
    assert report["left_out"]["short"] == sum(0 < len(text) < 37 for text in TEXTS) > 0
    assert report["left_out"]["long"] == sum(len(text) > 37 for text in TEXTS) > 0


def test_max_bytes_is_named_only_if_the_first_document_is_longer(tmp_path):
    message = r"^numbered:1, the first document, has \d+ bytes, but download\.max_bytes is 9: raise it"
    with pytest.raises(BadData, match=message):
        collect_in(tmp_path, numbered(), Limits(300, max_bytes=9))
    for limits in (LIMITS, Limits(300, max_bytes=9)):
        with pytest.raises(BadData, match=r"^no document .* was kept \(left out: 21 empty, .*\): add text$"):
            collect_in(tmp_path, replace(numbered(), lengths=range(9999, 10_000)), limits)


@pytest.mark.parametrize(
    ("corpus", "files", "name"),
    [
        ("docstrings", {}, "docstrings"),
        ("hub", {}, "wikitext-103"),
        ("files", {}, "your text"),
        ("files", {"patterns": ["corpus/shakespeare.jsonl.zst"]}, "shakespeare"),
        ("files", {"name": "The plays"}, "The plays"),
    ],
)
def test_a_corpus_has_a_name(corpus, files, name):
    assert download_params(corpus=corpus, files=files).corpus_name == name


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        *(
            ("files", {"patterns": [pattern]}, r"download\.files\.patterns")
            for pattern in ("/data/*.txt", "corpus/../a.txt", "**/*.txt", "~/a.txt", "corpus/*.pdf")
        ),
        ("files", {"split": "heading"}, "set heading to a regular expression"),
        ("files", {"heading": "("}, "should be a valid regular expression"),
        ("hub", {"revision": "main"}, "revision"),
        ("hub", {"revision": "refs/convert/parquet", "sha256": None}, "is a branch, whose content"),
        ("hub", {"opens_document": "y"}, "one of the two at most"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(section, changes, message):
    if section == "hub":
        changes = {"sets": {"wikitext-103": DOWNLOAD["hub"]["sets"]["tiny-shakespeare"] | changes}}
    download = DOWNLOAD | {"corpus": section, section: DOWNLOAD[section] | changes}
    with pytest.raises(BadConfig, match=message):
        parse_params(read_yaml(ROOT / "params.yaml") | {"download": download})


def test_the_stage_writes_both_folders_and_the_report(tmp_path, monkeypatch):
    tree = read_yaml(ROOT / "params.yaml")
    tree["download"]["corpus"] = "files"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for key, content in zip(("vocab_bpe_sha256", "encoder_json_sha256"), tokenizer_files(), strict=True):
        digest = tree["download"]["tokenizer"][key] = hashlib.sha256(content).hexdigest()
        write_bytes(Path(".state/wheels", digest), content)  # where the wheel's file would be kept
    write_json(Path("params.yaml"), tree)  # JSON is YAML
    for name in ("a.txt", "b.txt"):
        write_bytes(Path("corpus", name), b"hello")
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    assert "download: 1 documents; left out: 1 duplicate" in done.output
    report = json.loads(Path("reports/download.json").read_text())
    assert (report["corpus"], report["documents"], report["bytes"]) == ("files", 1, 5)
    assert report["tokenizer"]["vocab_size"] == 262
    assert verified_manifest(Path("data/documents"))["documents"] == 1
    assert load_encoding(Path("data/tokenizer")).encode_ordinary("hello") == [259]
    Path("corpus/a.txt").write_bytes(b"")
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert (done.exit_code, "error: corpus/a.txt is empty" in done.output) == (BadData.exit_code, True)
