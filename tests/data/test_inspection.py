"""Damaged token files are told from good ones; text that repeats itself is found with its twin."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, BadData, CheckFailed
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import atomic_folder, sha256_file
from compactgpt.config import Inspection, parse_params
from compactgpt.data.documents import new_document, row_groups, write_documents
from compactgpt.data.duplicates import (
    Scan,
    Task,
    digest_group,
    id_array,
    run_hashes,
    save_val_runs,
    word_hashes,
)
from compactgpt.data.inspection import inspect, passed
from stages.inspection import app
from tests.support.data_docs import compiled_once  # noqa: F401
from tests.support.tiny_corpus import write_token_file

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]
TREE = read_yaml(ROOT / "params.yaml")
PARAMS = Inspection.model_validate(
    TREE["inspection"] | {"min_val_documents": 2, "max_leaked_share": 0.0, "max_repeated_share": 0.0}
)
EOT = 60
VOCABULARY = [f"w{n}" for n in range(5000)]


def sentence(generator, words=120):
    return " ".join(generator.choices(VOCABULARY, k=words))


def texts(count=40):
    generator = random.Random(3)
    return [sentence(generator) for _ in range(count)]


def make(folder, train, val, spoil=None):
    """Documents in a shuffled order, and token files whose ids are the text's bytes modulo the vocabulary."""
    everything = [(text, False) for text in train] + [(text, True) for text in val]
    random.Random(1).shuffle(everything)
    documents = [new_document(text, f"a/{n}") for n, (text, _) in enumerate(everything)]
    facts = {"documents": len(documents), "bytes": sum(len(each.text) for each in documents)}
    with atomic_folder(folder / "documents", facts) as temporary:
        write_documents(temporary, documents, 2000)
    share = len(val) / len(everything)
    with atomic_folder(folder / "tokens", {"val_fraction": share}) as temporary:
        for name in ("train", "val"):
            own = [
                each for each, (_, held_out) in zip(documents, everything, strict=True)
                if held_out == (name == "val")
            ]  # fmt: skip
            rows = [
                (bytes.fromhex(each.id), len(each.text), np.frombuffer(each.text.encode(), np.uint8) % EOT)
                for each in own
            ]
            if spoil:
                spoil(name, rows)
            write_token_file(
                temporary / f"{name}.tokens",
                rows,
                vocab_size=EOT + 1,
                eot_token=EOT,
                tokenizer_sha256="0" * 64,
            )
    return folder


def check(folder, params=PARAMS, num_workers=1):
    return inspect(folder / "documents", folder / "tokens", folder / "docs", params, num_workers=num_workers)


def failures(report):
    """What was found where an expectation failed: {column: {table: value}}."""
    found = {}
    for each in report["expectations"]:
        if not each["success"]:
            found.setdefault(each["column"], {})[each["table"]] = each["observed"]
    return found


def test_good_token_files_pass_and_carry_the_hash_of_val(tmp_path):
    folder = make(tmp_path, texts()[:36], texts()[36:])
    report = check(folder)
    assert report["success"], failures(report)
    assert (report["documents"], report["train"]["documents"], report["val"]["documents"]) == (40, 36, 4)
    assert report["val"]["sha256"] == sha256_file(folder / "tokens/val.tokens")
    assert report["val"]["tokens"] == report["val"]["bytes"] + 4
    assert report["flagged"] == report["repeated"] == []
    assert passed(report)["val"] == {"passed": True, "sha256": report["val"]["sha256"]}
    assert (tmp_path / "docs/index.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "documents", "tokens"]


def drop_a_document(name, rows):
    if name == "train":
        del rows[3]


def swap_shorten_and_end_inside(name, rows):
    if name == "train":
        rows[5] = (rows[5][0], rows[5][1] - 1, rows[5][2])
    else:
        rows[0], rows[1] = rows[1], rows[0]
        rows[3] = (*rows[3][:2], np.where(np.arange(len(rows[3][2])) == 7, EOT, rows[3][2]))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (drop_a_document, {"documents_that_differ": {"train": 33}}),
        (
            swap_shorten_and_end_inside,
            {"documents_that_differ": {"train": 1, "val": 2}, "ends_inside": {"val": 1}},
        ),
    ],
)
def test_each_damage_to_a_token_file_fails_its_expectation_and_no_other(tmp_path, spoil, expected):
    assert failures(check(make(tmp_path, texts()[:36], texts()[36:], spoil))) == expected


def rewrite(path, change):
    """Alter tokens behind the writer's back, and the manifest with them, as a buggy program would."""
    content = bytearray(path.read_bytes())
    tokens = np.frombuffer(content, "<u2", offset=1024)
    change(tokens)
    path.write_bytes(content)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = sha256_file(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def test_an_id_beyond_the_vocabulary_and_a_lost_end_of_text_are_found(tmp_path):
    folder = make(tmp_path, texts()[:36], texts()[36:])

    def change(tokens):
        tokens[10] = EOT + 6
        tokens[np.flatnonzero(tokens == EOT)[1]] = 3

    rewrite(folder / "tokens/train.tokens", change)
    assert failures(check(folder)) == {
        "highest_token": {"train": EOT + 6},
        "documents_without_end": {"train": 1},
    }


def test_a_token_file_that_was_altered_is_refused_by_name(tmp_path):
    folder = make(tmp_path, texts()[:36], texts()[36:])
    path = folder / "tokens/val.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadData, match=r"val\.tokens has"):
        check(folder)


def test_a_val_split_that_is_too_small_or_not_a_fair_draw_is_found(tmp_path):
    folder = make(tmp_path, texts()[:36], texts()[36:])
    found = failures(check(folder, PARAMS.model_copy(update={"min_val_documents": 5})))
    assert found == {"documents": {"val": 4}}
    manifest = folder / "tokens/manifest.json"
    facts = json.loads(manifest.read_text()) | {"val_fraction": 0.5}
    manifest.write_text(json.dumps(facts))
    # 4 of 40 where 20 are expected: 16 / sqrt(40 x .5 x .5) = 5.06 standard deviations
    found = failures(check(folder))
    assert {key: round(value, 2) for key, value in found["share_deviation"].items()} == {
        "train": 5.06,
        "val": 5.06,
    }


# --- what repeats itself


def shuffled_case(text):
    return "  ".join(word.upper() for word in text.split()) + "!"


def changed(text, places):
    """One word in `places` replaced."""
    words = text.split()
    words[:: len(words) // places] = ["other"] * len(words[:: len(words) // places])
    return " ".join(words)


def test_planted_twins_and_overlap_are_found_with_their_twin_and_score(tmp_path):
    base = texts(60)
    train, val = base[:50], base[50:]
    train[10] = shuffled_case(val[0])  # the same words
    train[11] = changed(val[1], 2)  # a near duplicate across
    train[12] = changed(train[13], 2)  # one within train
    val[2] = " ".join([*val[2].split()[:60], *train[20].split()[60:]])  # half of a train document
    val[4] = changed(val[3], 2)  # one within val
    val[5] = " ".join([*val[5].split()[:100], *train[21].split()[100:]])  # 20 words of one
    folder = make(tmp_path, train, val)
    report = check(folder)
    number = {new_document(text, "").id: text for text in [*train, *val]}
    scores = {
        (each["kind"], number[each["id"]], number[each["twin"]["id"]]): each["score"]
        for each in report["flagged"]
    }
    assert scores.pop(("same words", val[0], train[10])) == 1.0
    assert scores.pop(("near duplicate", val[0], train[10])) == 1.0
    assert scores.pop(("near duplicate", val[1], train[11])) > 0.8
    assert scores.pop(("near duplicate", val[3], val[4])) > 0.8
    assert scores.pop(("near duplicate", val[4], val[3])) > 0.8
    # 60 words in a row hold 48 runs of 13, a whole document of 120 has 108; 20 words hold 8.
    assert scores.pop(("overlap", val[0], train[10])) == 1.0
    assert scores.pop(("overlap", val[1], train[11])) > 0.5
    assert scores.pop(("overlap", val[2], train[20])) == pytest.approx(48 / 108, abs=1e-6)
    assert scores.pop(("overlap", val[5], train[21])) == pytest.approx(8 / 108, abs=1e-6)
    assert scores == {}
    (pair,) = (each for each in report["repeated"])
    assert {number[pair["id"]], number[pair["twin"]["id"]]} == {train[12], train[13]}
    numbers = report["repetition"]
    assert numbers["same_words"] == {"documents": 2, "train": 1, "val": 1, "val_with_twin_in_train": 1}
    assert numbers["near_duplicates"] == {
        "documents": 8,
        "train": 4,
        "val": 4,
        "val_with_twin_in_train": 2,
    }
    assert numbers["overlap"]["val_documents_with_any"] == 4
    assert numbers["leaked_share"] == 0.2
    assert numbers["repeated_share"] == pytest.approx(8 / 60)
    assert set(failures(report)) == {"leaked_share", "repeated_share"}
    assert failures(report)["leaked_share"] == {"repetition": 0.2}


def test_what_is_found_is_the_same_whatever_the_workers(tmp_path):
    base = texts(60)
    base[7] = changed(base[55], 2)
    folder = make(tmp_path, base[:50], base[50:])
    groups = row_groups(folder / "documents")
    assert len(groups) > 16
    val = id_array(bytes.fromhex(new_document(text, "").id) for text in base[50:])
    found = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        scan = Scan(PARAMS, tmp_path / str(workers))
        for _ in scan.read(groups, val, 60, workers):
            pass
        near = scan.near_duplicates()
        answers = [*vars(scan.overlap()).values(), scan.same_words(), *vars(near).values(), scan.words]
        found.append([each.tolist() for each in answers])
    assert found[0] == found[1]
    assert max(found[0][5]) > 0.8


WORDS = st.lists(st.sampled_from(["a", "B", "c.", "é", "D_1"]), max_size=30).map(" ".join)


@given(WORDS, WORDS)
def test_runs_of_words_are_equal_where_the_words_are(one, other):
    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[n : n + 4]) for n in range(len(words) - 3)]

    ours = [run_hashes(word_hashes(text), 4) for text in (one, other)]
    assert [len(each) for each in ours] == [len(runs(one)), len(runs(other))]
    equal = ours[0][:, None] == ours[1][None, :]
    assert equal.tolist() == [[a == b for b in runs(other)] for a in runs(one)]


def test_similarity_is_jaccards_of_the_runs_within_four_standard_errors(tmp_path):
    generator = random.Random(5)
    base = sentence(generator, 400)
    documents = [base]
    for places in (1, 2, 4, 8, 12):
        documents.append(changed(base, places) + f" {places}")
    with atomic_folder(tmp_path / "documents") as temporary:
        write_documents(temporary, [new_document(text, "x") for text in documents])
    (tmp_path / "scratch").mkdir()
    params = PARAMS.model_copy(update={"similarity": 0.3, "bands": 64})
    scan = Scan(params, tmp_path / "scratch")
    groups = row_groups(tmp_path / "documents")
    wanted = id_array([bytes.fromhex(new_document(base, "x").id)])
    assert len(list(scan.read(groups, wanted, 6, 1))) == 1
    twins = scan.near_duplicates()

    def shingles(text):
        words = text.split()
        return {tuple(words[n : n + 5]) for n in range(len(words) - 4)}

    for number, text in enumerate(documents[1:], 1):
        exact = len(shingles(base) & shingles(text)) / len(shingles(base) | shingles(text))
        found = twins.similarity_across[number]
        assert twins.twin_across[number] == 0
        assert abs(found - exact) < 4 * (exact * (1 - exact) / 128) ** 0.5 + 1e-6


def test_of_a_val_document_with_very_many_runs_a_sample_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("compactgpt.data.duplicates.RUNS_PER_DOCUMENT", 500)
    base = sentence(random.Random(7), 2500)
    documents = [new_document(text, "x") for text in (base, changed(base, 3))]
    with atomic_folder(tmp_path / "documents") as temporary:
        write_documents(temporary, documents)
    groups = row_groups(tmp_path / "documents")
    save_val_runs(tmp_path, groups, id_array([bytes.fromhex(documents[0].id)]), 13)
    assert len(np.load(tmp_path / "runs.npy")) == 500
    (digest,) = (digest_group(Task(group, PARAMS, tmp_path)) for group in groups)
    assert abs(len(digest.runs) / 500 - (2488 - 3 * 13) / 2488) < 0.02


def test_documents_without_words_are_no_twins(tmp_path):
    base = [*texts(20), "!!! ???", "... ---", "--- ..."]
    report = check(make(tmp_path, base[:12] + base[20:], base[12:20]))
    assert report["repetition"]["repeated_share"] == 0
    assert report["repetition"]["overlap"]["val_documents_with_any"] == 0


def test_the_stage_writes_the_report_before_it_fails_and_the_pass_only_after(tmp_path, monkeypatch):
    base = texts()
    part = TREE["inspection"] | {"min_val_documents": 5}
    YAML().dump(TREE | {"inspection": part}, tmp_path / "params.yaml")
    make(tmp_path / "data", base[:36], base[36:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == CheckFailed.exit_code
    assert (
        "the token files fail 1 of 14 expectations:\n  val: documents: 4, expected at least 5" in done.output
    )
    assert "Data Docs: data/data_docs/tokens/index.html" in done.output
    pages = {path.parts[4:6] for path in Path("data/data_docs/tokens").rglob("validations/**/*.html")}
    assert pages == {(table, "inspection") for table in ("train", "val", "repetition")}
    assert not json.loads(Path("reports/inspection.json").read_text())["success"]
    assert not Path("data/inspection.json").exists()
    YAML().dump(TREE | {"inspection": part | {"min_val_documents": 4}}, tmp_path / "params.yaml")
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("data/inspection.json").read_text())["val"]["passed"]


def test_bands_must_share_out_the_permutations():
    part = TREE["inspection"] | {"bands": 15}
    with pytest.raises(BadConfig, match=r"permutations \(128\) must be a multiple of bands \(15\)"):
        parse_params(TREE | {"inspection": part})
