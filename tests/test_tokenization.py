"""Documents become ids as tiktoken's own, in two splits, the same whatever the number of workers."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public
from typer.testing import CliRunner

from compactgpt import documents as documents_room
from compactgpt import encoding
from compactgpt.config import Tokenization
from compactgpt.data import open_tokens
from compactgpt.documents import new_document, read_row_group, row_groups
from compactgpt.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.storage import sha256_file
from compactgpt.tokenization import load_encoding, split_of, tokenize
from stages.tokenization import app
from tests.tiny_corpus import EOT, make_documents, make_tokenizer, tokenizer_files

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".state" / "wheels"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
HALF = Tokenization(val_fraction=0.5)
TEXTS = [f"document {n} says hello world, {n * n} times\n" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_room, "ROW_GROUP_BYTES", 200)
    return make_documents(tmp_path / "documents", TEXTS)


def test_a_hand_worked_text(tokenizer):
    h, e, hell, hello, space_w = ord("h") - 33, ord("e") - 33, 258, 259, 260
    found = load_encoding(tokenizer)
    assert found.encode_ordinary("hello") == [hello]
    assert found.encode_ordinary("hell") == [hell]
    assert found.encode_ordinary("eh") == [e, h]
    assert found.encode_ordinary("hello wh") == [hello, space_w, h]
    assert found.eot_token == EOT == 261
    assert found.n_vocab == 262


def test_ranks_are_the_ones_that_tiktoken_reads_from_the_same_files(tokenizer, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    expected = data_gym_to_mergeable_bpe_ranks(str(tokenizer / "vocab.bpe"), str(tokenizer / "encoder.json"))
    assert load_encoding(tokenizer)._mergeable_ranks == expected
    assert openai_public.r50k_pat_str == encoding.GPT2_PATTERN


@pytest.mark.skipif(not (WHEELS / GPT2_FILES["vocab.bpe"]).exists(), reason="GPT-2's files are not fetched")
def test_known_ids_of_gpt2(tmp_path):
    encoding.save_gpt2(tmp_path / "gpt2", *((WHEELS / name).read_bytes() for name in GPT2_FILES.values()))
    found = load_encoding(tmp_path / "gpt2")
    assert found.n_vocab == 50257
    assert found.eot_token == 50256
    assert found.encode_ordinary("hello world") == [31373, 995]
    assert found.encode_ordinary("The future of AI is") == [464, 2003, 286, 9552, 318]


@pytest.fixture(scope="module")
def found(tokenizer):
    return load_encoding(tokenizer)


@given(st.text())
def test_any_text_comes_back(found, text):
    tokens = found.encode_to_numpy(text, disallowed_special=())
    assert found.decode(tokens.tolist()) == text
    assert tokens.tolist() == found.encode_ordinary(text)


def test_another_encoding_is_saved_whole(tmp_path, monkeypatch):
    ranks = {bytes([n]): n for n in range(256)} | {b"ab": 256}
    special = {"<|endoftext|>": 257, "<|other|>": 300}
    made = tiktoken.Encoding("cl100k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _name: made)
    facts = encoding.save_named(tmp_path / "tokenizer", "cl100k_base")
    found = load_encoding(tmp_path / "tokenizer")
    assert facts["vocab_size"] == found.n_vocab == 301
    assert (
        (tmp_path / "tokenizer" / "ranks.tiktoken").read_bytes().startswith(base64.b64encode(b"\0") + b" 0\n")
    )
    assert found.encode_ordinary("ab c") == made.encode_ordinary("ab c") == [256, 32, 99]
    assert found.encode("<|other|>", allowed_special="all") == [300]


def test_an_unknown_encoding_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(BadConfig, match=r"encoding: found 'gpt22'; allowed: .*cl100k_base"):
        encoding.save_named(tmp_path / "tokenizer", "gpt22")


def test_no_network_for_another_encoding_is_one_sentence(tmp_path, monkeypatch):
    def refuse(_name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(Unreachable, match=r"can't fetch the encoding cl100k_base .* or use gpt2"):
        encoding.save_named(tmp_path / "tokenizer", "cl100k_base")
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    vocab_bpe, encoder_json = tokenizer_files()
    ids = json.loads(encoder_json)
    ids["hello"], ids["ll"] = ids["ll"], ids["hello"]
    for files in [(vocab_bpe, json.dumps(ids).encode()), (vocab_bpe[:-8], encoder_json)]:
        with pytest.raises(BadData, match="do not agree"):
            encoding.save_gpt2(tmp_path / "tokenizer", *files)
    for files in [(b"#version\n\xff\n", encoder_json), (vocab_bpe, b"<html>"), (vocab_bpe, b"[]")]:
        with pytest.raises(BadData, match="no GPT-2 tokenizer file"):
            encoding.save_gpt2(tmp_path / "tokenizer", *files)


def test_an_altered_tokenizer_is_refused(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    (folder / "vocab.bpe").write_bytes((folder / "vocab.bpe").read_bytes().replace(b"l l", b"l o"))
    with pytest.raises(BadData, match=r"vocab\.bpe was altered"):
        load_encoding(folder)
    with pytest.raises(MissingInput, match="dvc repro"):
        load_encoding(tmp_path / "nothing")


def test_an_edited_pattern_is_another_tokenizer(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"pattern": "."}))
    with pytest.raises(BadData, match="not the tokenizer that was saved"):
        load_encoding(folder)


def test_the_split_is_the_ids_place_between_0_and_1():
    assert split_of("3fffffffffffffff" + "0" * 16, 0.25) == "val"
    assert split_of("4000000000000000" + "0" * 16, 0.25) == "train"
    assert split_of("00" * 16, 1e-9) == "val"


def test_every_document_is_in_one_split_in_order_and_spelled_right(tmp_path, tokenizer, documents):
    report = tokenize(documents, tokenizer, tmp_path / "tokens", HALF, num_workers=1)
    found = load_encoding(tokenizer)
    for split in ("train", "val"):
        expected = [new_document(text, "") for text in TEXTS]
        expected = [each for each in expected if (int(each.id, 16) < 2**127) == (split == "val")]
        file = open_tokens(tmp_path / "tokens" / f"{split}.tokens")
        assert file.document_ids == [each.id for each in expected]
        assert [found.decode(file.document(n).tolist()) for n in range(len(expected))] == [
            each.text for each in expected
        ]
        tokens = sum(len(found.encode_ordinary(each.text)) + 1 for each in expected)
        total = sum(len(each.text.encode()) for each in expected)
        assert report[split]["documents"] == len(expected)
        assert report[split]["tokens"] == tokens
        assert report[split]["bytes"] == int(file.byte_lengths.sum()) == total
        assert report[split]["bytes_per_token"] == total / (tokens - len(expected))
        assert report[split]["sha256"] == sha256_file(tmp_path / "tokens" / f"{split}.tokens")


def test_the_longest_documents_share_is_reported(tmp_path, tokenizer):
    documents = make_documents(tmp_path / "documents", [*(str(n) for n in range(40)), "x" * 500])
    report = tokenize(documents, tokenizer, tmp_path / "tokens", HALF, num_workers=1)
    shares = [report[split]["longest_document_share"] for split in ("train", "val")]
    assert max(shares) > 0.85
    assert min(shares) < 0.2


def test_the_files_are_the_same_whatever_the_number_of_workers(tmp_path, tokenizer, documents):
    assert len(row_groups(documents)) > 6
    hashes = []
    for num_workers in (1, 2, 3):
        folder = tmp_path / f"tokens{num_workers}"
        report = tokenize(documents, tokenizer, folder, HALF, num_workers=num_workers)
        hashes.append((report, {path.name: sha256_file(path) for path in folder.iterdir()}))
    assert hashes[0] == hashes[1] == hashes[2]


def test_growth_never_moves_a_document(tmp_path, tokenizer):
    def ids(name, texts):
        tokenize(make_documents(tmp_path / name, texts), tokenizer, tmp_path / "tokens", HALF, num_workers=1)
        return {
            split: set(open_tokens(tmp_path / "tokens" / f"{split}.tokens").document_ids)
            for split in ("train", "val")
        }

    small, large = ids("small", TEXTS[20:40]), ids("large", TEXTS)
    assert small["train"] < large["train"]
    assert small["val"] < large["val"]
    assert not large["train"] & large["val"]


def test_special_tokens_in_text_are_ordinary(tmp_path, tokenizer):
    texts = [f"{n} <|endoftext|> <|endoftext|>" for n in range(20)]
    tokenize(make_documents(tmp_path / "d", texts), tokenizer, tmp_path / "t", HALF, num_workers=1)
    for split in ("train", "val"):
        file = open_tokens(tmp_path / "t" / f"{split}.tokens")
        assert np.count_nonzero(file.tokens == EOT) == file.header.documents


def test_a_split_without_documents_is_refused_and_the_old_files_stay(tmp_path, tokenizer, documents):
    tokenize(documents, tokenizer, tmp_path / "tokens", HALF, num_workers=1)
    before = sha256_file(tmp_path / "tokens" / "val.tokens")
    for fraction, empty in [(1e-9, "val"), (1 - 1e-9, "train")]:
        with pytest.raises(BadData, match=f"no document of 60 fell into {empty}.*val_fraction"):
            tokenize(
                documents, tokenizer, tmp_path / "tokens", Tokenization(val_fraction=fraction), num_workers=1
            )
    assert sha256_file(tmp_path / "tokens" / "val.tokens") == before


def test_altered_documents_are_refused(tmp_path, tokenizer, documents):
    shard = documents / "documents-00000.parquet"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(BadData, match=r"documents-00000\.parquet was altered"):
        tokenize(documents, tokenizer, tmp_path / "tokens", HALF, num_workers=1)


def test_shards_give_the_documents_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_room, "ROW_GROUP_BYTES", 100)
    monkeypatch.setattr(documents_room, "SHARD_BYTES", 300)
    folder = make_documents(tmp_path / "documents", [*TEXTS, "é\0\U0001f600", "x" * 1000])
    assert len(list(folder.glob("*.parquet"))) > 5
    found = [document for group in row_groups(folder) for document in read_row_group(group)]
    assert [each.text for each in found] == [*TEXTS, "é\0\U0001f600", "x" * 1000]
    assert [each.source for each in found] == [f"tiny/{n}" for n in range(62)]
    assert found[0].id == hashlib.sha256(TEXTS[0].encode()).hexdigest()[:32]


def test_the_door_writes_files_and_report(tmp_path, monkeypatch, tokenizer, documents):
    params = (ROOT / "params.yaml").read_text().replace("num_workers: 2", "num_workers: 1")
    (tmp_path / "params.yaml").write_text(params.replace("val_fraction: 0.005", "val_fraction: 0.5"))
    monkeypatch.chdir(tmp_path)
    words = ["--documents", str(documents), "--tokenizer", str(tokenizer), "--tracker", "none"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads(Path("reports/tokenization.json").read_text())
    assert report["val"]["sha256"] == sha256_file(Path("data/tokens/val.tokens"))
    assert report["val"]["documents"] + report["train"]["documents"] == 60
    done = CliRunner().invoke(app, [*words, "--documents", "nowhere"])
    assert done.exit_code == MissingInput.exit_code
    assert "nowhere/manifest.json is missing" in done.output
