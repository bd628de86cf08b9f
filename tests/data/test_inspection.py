"""Damage to token files is found; text that repeats itself is found with its twin."""

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from compactgpt.common.errors import CheckFailed
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import atomic_folder, sha256_file
from compactgpt.config import Inspection, Tokenization
from compactgpt.data import inspection
from compactgpt.data.documents import Document, new_document, write_shards
from compactgpt.data.inspection import inspect, passed, uncompared
from compactgpt.data.tokenization import tokenize
from stages.inspection import app
from tests.support.data_docs import compiled_once  # noqa: F401
from tests.support.tiny_corpus import make_documents, make_tokenizer, write_token_file

pytestmark = pytest.mark.usefixtures("compiled_once")
TREE = read_yaml(Path(__file__).parents[2] / "params.yaml")
SECTION = TREE["inspection"] | {"min_val_documents": 2, "max_leaked_share": 0.0, "max_repeated_share": 0.0}
PARAMS = Inspection.model_validate(SECTION)
EOT = 60
WORDS = [f"w{n}" for n in range(5000)]


def random_texts(count, words=120):
    generator = random.Random(3)
    return [" ".join(generator.choices(WORDS, k=words)) for _ in range(count)]


def write_inputs(folder, train, val, spoil=lambda name, rows: None):
    """Documents in a shuffled order, and token files whose ids are the text's bytes modulo the vocabulary.

    An id begins with f (train) or 0 (val). A source is the split and the number of the text.
    """
    documents = [
        Document(first + new_document(text, "").id[1:], text, f"{split} {number}")
        for split, first, texts in (("train", "f", train), ("val", "0", val))
        for number, text in enumerate(texts)
    ]
    random.Random(1).shuffle(documents)
    facts = {"documents": len(documents), "bytes": sum(len(each.text) for each in documents)}
    with atomic_folder(folder / "documents", facts) as temporary:
        list(write_shards(temporary, documents, 2000))
    with atomic_folder(folder / "tokens", {"val_fraction": len(val) / len(documents)}) as temporary:
        for name in ("train", "val"):
            rows = [
                (bytes.fromhex(each.id), len(each.text), np.frombuffer(each.text.encode(), np.uint8) % EOT)
                for each in documents
                if each.source.startswith(name)
            ]
            spoil(name, rows)
            settings = {"vocab_size": EOT + 1, "eot_token": EOT, "tokenizer_sha256": "0" * 64}
            write_token_file(temporary / f"{name}.tokens", rows, **settings)
    return folder


def write_split(folder, *spoil):
    """Write 36 train documents and 4 val documents that differ."""
    texts = random_texts(40)
    return write_inputs(folder, texts[:36], texts[36:], *spoil)


def check(folder, params=PARAMS, num_workers=1):
    return inspect(folder / "documents", folder / "tokens", folder / "docs", params, num_workers=num_workers)


def failures(report):
    """What was found where an expectation failed: {column: {table: value}}."""
    found = defaultdict(dict)
    for each in report["expectations"]:
        if not each["success"]:
            found[each["column"]][each["table"]] = each["observed"]
    return found


# --- the token files


def test_good_token_files_pass_and_the_report_has_their_hashes(tmp_path):
    report = check(write_split(tmp_path))
    assert report["success"], failures(report)
    assert (report["documents"], report["train"]["documents"], report["val"]["documents"]) == (40, 36, 4)
    assert report["val"]["sha256"] == sha256_file(tmp_path / "tokens/val.tokens")
    assert report["val"]["tokens"] == report["val"]["bytes"] + 4
    assert report["flagged"] == report["repeated"] == []
    assert passed(report)["val"] == {"passed": True, "sha256": report["val"]["sha256"]}
    assert (tmp_path / "docs/index.html").exists()


def spoil_documents(name, rows):
    if name == "train":
        rows[5] = (rows[5][0], rows[5][1] - 1, rows[5][2])  # another length
        del rows[-1]
    else:
        rows[0], rows[1] = rows[1], rows[0]
        rows[3] = (*rows[3][:2], np.where(np.arange(len(rows[3][2])) == 7, EOT, rows[3][2]))


def test_documents_that_differ_from_the_corpus_are_counted(tmp_path):
    found = failures(check(write_split(tmp_path, spoil_documents)))
    assert found == {"documents_that_differ": {"train": 2, "val": 2}, "ends_inside": {"val": 1}}


def test_altered_tokens_are_found_even_if_the_manifest_was_altered_too(tmp_path):
    path = write_split(tmp_path) / "tokens/train.tokens"
    content = bytearray(path.read_bytes())
    tokens = np.frombuffer(content, "<u2", offset=1024)
    tokens[10] = EOT + 6  # not in the vocabulary
    tokens[np.flatnonzero(tokens == EOT)[1]] = 3  # a document without end
    path.write_bytes(content)
    change_manifest(tmp_path, "files", "train.tokens", "sha256", value=sha256_file(path))
    found = failures(check(tmp_path))
    assert found == {"highest_token": {"train": EOT + 6}, "documents_without_end": {"train": 1}}


def change_manifest(folder, *keys, value):
    path = folder / "tokens/manifest.json"
    node = facts = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(facts))


def test_a_val_split_that_is_too_small_or_not_a_fair_draw_is_found(tmp_path):
    change_manifest(write_split(tmp_path), "val_fraction", value=0.5)
    found = failures(check(tmp_path, PARAMS.model_copy(update={"min_val_documents": 5})))
    # 4 of 40 where 20 are expected: 16 / sqrt(40 x .5 x .5) = 5.06 standard deviations
    deviations = pytest.approx({"train": 5.06, "val": 5.06}, abs=0.005)
    assert found == {"documents": {"val": 4}, "share_deviation": deviations}


def test_the_split_tail_passes_and_is_compared_with_the_documents(tmp_path):
    documents = make_documents(tmp_path / "documents", random_texts(40))
    params = Tokenization(val_fraction=0.2, split="tail")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    tokenize(documents, tokenizer, tmp_path / "tokens", params, num_workers=1, state=tmp_path / "state")
    report = check(tmp_path)
    assert report["success"], failures(report)
    assert report["val"]["documents"] == 8
    change_manifest(tmp_path, "val_fraction", value=0.5)
    assert failures(check(tmp_path)) == {"documents_that_differ": {"train": 12, "val": 20}}


# --- repetition


def replace_words(text, count):
    """Replace `count` words of a text, evenly spaced."""
    words = text.split()
    words[:: len(words) // count] = ["other"] * len(words[:: len(words) // count])
    return " ".join(words)


def test_planted_twins_and_overlap_are_found_with_their_twin_and_score(tmp_path):
    texts = random_texts(60)
    train, val = texts[:50], texts[50:]
    train[10] = "  ".join(word.upper() for word in val[0].split()) + "!"  # the same words
    train[11] = replace_words(val[1], 2)  # a near duplicate across
    train[12] = replace_words(train[13], 2)  # one within train
    val[2] = " ".join([*val[2].split()[:60], *train[20].split()[60:]])  # half of a train document
    val[4] = replace_words(val[3], 2)  # one within val
    val[5] = " ".join([*val[5].split()[:100], *train[21].split()[100:]])  # 20 words of one
    report = check(write_inputs(tmp_path, train, val))
    scores = {
        (each["kind"], each["source"], each["twin"]["source"]): each["score"] for each in report["flagged"]
    }
    near = pytest.approx(0.9, abs=0.1)
    # 60 words in a row hold 48 n-grams of 13, a document of 120 words has 108; 20 words hold 8.
    assert scores == {
        ("near duplicate", "val 0", "train 10"): 1.0,
        ("near duplicate", "val 1", "train 11"): near,
        ("near duplicate", "val 3", "val 4"): near,
        ("near duplicate", "val 4", "val 3"): near,
        ("overlap", "val 0", "train 10"): 1.0,
        ("overlap", "val 1", "train 11"): pytest.approx(0.75, abs=0.25),
        ("overlap", "val 2", "train 20"): pytest.approx(48 / 108, abs=1e-6),
        ("overlap", "val 5", "train 21"): pytest.approx(8 / 108, abs=1e-6),
    }
    (pair,) = report["repeated"]
    assert {pair["source"], pair["twin"]["source"]} == {"train 12", "train 13"}
    assert report["repetition"]["near_duplicates"] == 8
    assert failures(report) == {
        "leaked_share": {"repetition": 0.2},
        "repeated_share": {"repetition": pytest.approx(8 / 60)},
    }


def test_a_text_that_occurs_very_often_is_found_in_train_for_each_copy_in_val(tmp_path):
    text, *others = random_texts(31)
    train = [f"{text} {'!' * n}" for n in range(30)] + others
    numbers = check(write_inputs(tmp_path, train, [f"{text} {'?' * n}" for n in range(20)]))["repetition"]
    assert (numbers["near_duplicates"], numbers["leaked_share"]) == (50, 1.0)


@pytest.mark.parametrize(
    "characters",
    [
        pytest.param(range(0x4E00, 0x5184), id="Chinese"),
        pytest.param([*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)], id="Japanese"),
        pytest.param([*range(0xE01, 0xE2F), *range(0xE30, 0xE3A)], id="Thai"),
        pytest.param([*range(0xE94, 0xE98), *range(0xE99, 0xEA0), *range(0xEB0, 0xEBA)], id="Lao"),
        pytest.param(range(0x1780, 0x17C6), id="Khmer"),
        pytest.param(range(0x1000, 0x1032), id="Burmese"),
    ],
)
def test_a_changed_character_does_not_hide_a_copy_in_a_script_without_spaces(tmp_path, characters):
    generator = random.Random(4)
    train = ["".join(map(chr, generator.choices(characters, k=300))) for _ in range(20)]
    val = [f"{text[:150]}{chr(characters[0])}{text[151:]}" for text in train]
    numbers = check(write_inputs(tmp_path, train, val))["repetition"]
    assert (numbers["near_duplicates"], numbers["leaked_share"]) == (40, 1.0)
    # All n-grams of 13 characters of a text are in its copy, but those that hold the changed character.
    assert numbers["ngrams_in_train"] == pytest.approx(20 * (288 - 13), rel=0.01)


def test_a_check_that_compared_hardly_anything_says_so(tmp_path):
    texts = [*random_texts(20, words=8), *random_texts(4), "!!! ???", "... ---", "--- ..."]
    report = check(write_inputs(tmp_path, texts[5:], texts[:5]))
    assert report["repetition"]["repeated_share"] == 0  # documents without words are not twins
    assert "5 of 5 val documents have fewer than 13 words: " in uncompared(report, PARAMS.overlap_words)


def test_the_report_does_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_GROUPS_PER_WORKER", 1)
    texts = random_texts(60)
    write_inputs(tmp_path, texts[:50], [replace_words(texts[7], 2), *texts[50:]])
    one, two = (check(tmp_path, num_workers=number) for number in (1, 2))
    assert one == two
    assert one["flagged"]


# --- the stage


def test_the_stage_says_that_hardly_anything_was_compared(tmp_path, monkeypatch):
    texts = random_texts(40, words=12)
    write_inputs(tmp_path / "data", texts[:36], texts[36:])
    (tmp_path / "params.yaml").write_text(json.dumps(TREE | {"inspection": SECTION}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    assert "inspection: 4 of 4 val documents have fewer than 13 words: " in done.output


def test_the_stage_writes_the_report_before_it_fails_and_the_pass_only_after(tmp_path, monkeypatch):
    section = TREE["inspection"] | {"min_val_documents": 5}
    (tmp_path / "params.yaml").write_text(json.dumps(TREE | {"inspection": section}))  # JSON is YAML
    write_split(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == CheckFailed.exit_code
    assert "the token files fail 1 of 14 expectations:" in done.output
    assert "  val: documents: found 4, expected at least 5; add text" in done.output
    assert not json.loads(Path("reports/inspection.json").read_text())["success"]
    assert not Path("data/inspection.json").exists()
    section["min_val_documents"] = 4
    (tmp_path / "params.yaml").write_text(json.dumps(TREE | {"inspection": section}))
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("data/inspection.json").read_text())["val"]["passed"]
