"""Documents become ids as tiktoken's own, in two splits, the same whatever the number of workers."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import atomic_folder, sha256_file, verified_manifest
from compactgpt.config import Tokenization
from compactgpt.data import documents as documents_room
from compactgpt.data import encoder, encoding, tokenization
from compactgpt.data.documents import new_document, read_row_group, row_groups
from compactgpt.data.encoding import load_encoding
from compactgpt.data.token_files import open_tokens
from compactgpt.data.tokenization import split_of
from stages.tokenization import app
from tests.support.tiny_corpus import EOT, make_documents, make_tokenizer, tokenizer_files

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".state" / "wheels"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
HALF = Tokenization(val_fraction=0.5)
TEXTS = [f"document {n} says hello world, {n * n} times\n" for n in range(60)]


def tokenize(documents, tokenizer, folder, params, *, num_workers=1, **kwargs):
    state = folder.parent / "state"
    return tokenization.tokenize(
        documents, tokenizer, folder, params, num_workers=num_workers, state=state, **kwargs
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_room, "ROW_GROUP_BYTES", 200)
    return make_documents(tmp_path / "documents", TEXTS, shard_bytes=500)  # five shards or more


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
    folder = tmp_path / "documents"
    folder.mkdir()
    texts = [*TEXTS, "é\0\U0001f600", "x" * 1000]
    documents = (new_document(text, f"tiny/{n}") for n, text in enumerate(texts))
    documents_room.write_documents(folder, documents, shard_bytes=300)
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


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def made_groups(monkeypatch):
    """Note the row groups that are encoded from here on."""
    made = []
    encode_group = tokenization.encode_group

    def noting(task):
        made.append((task.group.path.stem, task.group.index))
        return encode_group(task)

    monkeypatch.setattr(tokenization, "encode_group", noting)
    return made


def names(groups):
    return [(group.path.stem, group.index) for group in groups]


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_stopped_run_goes_on_behind_the_last_finished_shard(
    tmp_path, monkeypatch, tokenizer, documents, stop
):
    tokenize(documents, tokenizer, tmp_path / "whole", HALF)
    groups = row_groups(documents)
    calls = []

    def stopping(done, total, figures=None):
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, tmp_path / "tokens", HALF, progress=stopping)
    assert not (tmp_path / "tokens").exists()
    made = made_groups(monkeypatch)
    notes = []
    tokenize(documents, tokenizer, tmp_path / "tokens", HALF, progress=lambda *words: notes.append(words))
    finished = {group.path.stem for group in groups[:stop]} - {
        group.path.stem for group in groups[stop - 1 :]
    }
    assert made == [each for each in names(groups) if each[0] not in finished]
    said = f"{len(finished)} of 5 shards are finished already"
    assert not finished or notes[0][2] == {"note:": said}
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
    assert list((tmp_path / "state").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from compactgpt.data.token_files import tokenization
from compactgpt.config import Tokenization

def progress(done, total, figures=None):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    tokenization.WORKER_BYTES = 1
    documents, tokenizer, out, state = map(Path, sys.argv[1:])
    params = Tokenization(val_fraction=0.5)
    tokenization.tokenize(documents, tokenizer, out, params, num_workers=2, state=state, progress=progress)
"""


def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, tokenizer, documents):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [documents, tokenizer, tmp_path / "tokens", tmp_path / "state"]
    done = subprocess.run(
        [sys.executable, script, *words], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "tokens").exists()
    made = made_groups(monkeypatch)
    tokenize(documents, tokenizer, tmp_path / "tokens", HALF)
    assert 0 < len(made) < len(row_groups(documents))
    tokenize(documents, tokenizer, tmp_path / "whole", HALF)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_processes_and_the_reference_encoder_give_the_same_bytes(tmp_path, monkeypatch, tokenizer, documents):
    tokenize(documents, tokenizer, tmp_path / "one", HALF)
    monkeypatch.setattr(tokenization, "WORKER_BYTES", 1)
    tokenize(documents, tokenizer, tmp_path / "two", HALF, num_workers=2)
    monkeypatch.undo()
    slow = Tokenization(val_fraction=0.5, encoder="tiktoken")
    tokenize(documents, tokenizer, tmp_path / "slow", slow)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "slow")


def test_a_chunk_that_was_altered_is_named_and_made_again(tmp_path, monkeypatch, tokenizer, documents):
    def stopping(done, total, figures=None):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, tmp_path / "tokens", HALF, progress=stopping)
    (state,) = (tmp_path / "state").iterdir()
    damaged = state / "documents-00001"
    raw = bytearray((damaged / "train.tokens").read_bytes())
    raw[3] ^= 1
    (damaged / "train.tokens").write_bytes(raw)
    notes = []
    made = made_groups(monkeypatch)
    tokenize(documents, tokenizer, tmp_path / "tokens", HALF, progress=lambda *words: notes.append(words))
    assert {"note:": f"{damaged} was altered: made again"} in [each[2] for each in notes if len(each) > 2]
    assert "documents-00001" in dict(made)
    assert "documents-00000" not in dict(made)
    tokenize(documents, tokenizer, tmp_path / "whole", HALF)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_chunks_of_other_documents_or_another_split_are_never_used(tmp_path, tokenizer, documents):
    def stopping(done, total, figures=None):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, tmp_path / "tokens", HALF, progress=stopping)
    (before,) = (tmp_path / "state").iterdir()
    other = Tokenization(val_fraction=0.4)
    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, tmp_path / "tokens", other, progress=stopping)
    (after,) = (tmp_path / "state").iterdir()
    assert before != after


def test_a_document_longer_than_a_span_gives_the_same_ids(tmp_path, monkeypatch, tokenizer):
    texts = ["hello wide world, hello\n" * 3000, "short", *(str(n) for n in range(30))]
    documents = make_documents(tmp_path / "documents", texts)
    tokenize(documents, tokenizer, tmp_path / "whole", HALF)
    monkeypatch.setattr(encoder, "SPAN_BYTES", 1000)
    tokenize(documents, tokenizer, tmp_path / "spans", HALF)
    assert contents(tmp_path / "spans") == contents(tmp_path / "whole")


def write_shards(folder, texts):
    with atomic_folder(folder, {"documents": len(texts), "bytes": 0}) as temporary:
        documents_room.write_documents(
            temporary, (new_document(text, f"t/{n}") for n, text in enumerate(texts))
        )
    return folder


def test_a_run_without_an_end_is_refused_with_its_document_and_source(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encoder, "SPAN_BYTES", 500)
    monkeypatch.setattr(encoder, "LONGEST_RUN_BYTES", 4000)
    text = "words " * 1000 + "x" * 5000
    folder = write_shards(tmp_path / "documents", ["short", text])
    says = (
        rf"^t/1 \(document {new_document(text, '').id} in .*documents-00000\.parquet\): from byte [0-9,]+ on"
    )
    with pytest.raises(BadData, match=says):
        tokenize(folder, tokenizer, tmp_path / "tokens", HALF)


def test_shards_of_another_version_are_refused_by_name(tmp_path, tokenizer):
    with atomic_folder(tmp_path / "documents", {"documents": 1, "bytes": 1}) as temporary:
        table = pa.table({"id": ["00" * 16], "text": ["x"], "source": ["x"]})
        pq.write_table(table, temporary / "documents-00000.parquet")
    with pytest.raises(BadData, match=r"documents-00000\.parquet has columns .*'source'\], .* are wanted"):
        tokenize(tmp_path / "documents", tokenizer, tmp_path / "tokens", HALF)


def test_shards_with_documents_in_parts_are_refused_by_name(tmp_path, tokenizer):
    with atomic_folder(tmp_path / "documents", {"documents": 1, "bytes": 2}) as temporary:
        ids, parts = ["00" * 16] * 2, pa.array([0, 1], pa.int32())
        table = pa.table({"id": ids, "text": ["x", "y"], "source": ["a", "a"], "part": parts})
        pq.write_table(table, temporary / "documents-00000.parquet")
    with pytest.raises(BadData, match=r"documents-00000\.parquet has documents in parts"):
        tokenize(tmp_path / "documents", tokenizer, tmp_path / "tokens", HALF)


def test_nul_bytes_and_odd_characters_come_back(tmp_path, tokenizer):
    texts = [f"{n}\0nul\x7f\ufeff\ufffd\U0010ffff\u088f é\u0301 {chr(0x323B0 + n)}'s" for n in range(20)]
    tokenize(make_documents(tmp_path / "d", texts), tokenizer, tmp_path / "t", HALF)
    found = load_encoding(tokenizer)
    back = []
    for split in ("train", "val"):
        file = open_tokens(tmp_path / "t" / f"{split}.tokens")
        back += [found.decode(file.document(n).tolist()) for n in range(file.header.documents)]
    assert sorted(back) == sorted(texts)


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path, tokenizer):
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"a\xed\xa0")]
    )
    columns = {"id": ["00" * 16], "text": text, "source": ["x"], "part": pa.array([0], pa.int32())}
    with atomic_folder(tmp_path / "documents", {"documents": 1, "bytes": 3}) as temporary:
        pq.write_table(pa.table(columns), temporary / "documents-00000.parquet")
    with pytest.raises(BadData, match=r"documents-00000\.parquet, row group 0, is damaged .*UTF8"):
        tokenize(tmp_path / "documents", tokenizer, tmp_path / "tokens", HALF)


def test_a_shard_cut_short_is_refused_by_name_even_by_a_worker_alone(tmp_path, tokenizer, documents):
    facts = verified_manifest(tokenizer)
    group = row_groups(documents)[1]
    raw = group.path.read_bytes()
    task = tokenization.Task(group, tokenizer, facts["tokenizer_sha256"], "tiktoken", 0.5)
    group.path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadData, match=r"documents-00000\.parquet, row group 1, is damaged"):
        tokenization.encode_group(task)


def test_an_id_not_below_the_vocabulary_is_refused_by_name(tmp_path, monkeypatch, tokenizer, documents):
    class Beyond:
        encoding = load_encoding(tokenizer)

        def encode(self, text):
            yield np.array([5, 262], np.uint32)

    monkeypatch.setattr(tokenization, "_cached_encoder", lambda *_words: Beyond())
    with pytest.raises(BadData, match=r"documents-00000\.parquet, row group 0: .* token id not below 262"):
        tokenize(documents, tokenizer, tmp_path / "tokens", HALF)


def test_a_corpus_of_nothing_is_refused(tmp_path, tokenizer):
    with pytest.raises(BadData, match="no document of 0 fell into train"):
        tokenize(make_documents(tmp_path / "d", []), tokenizer, tmp_path / "t", HALF)


def test_altered_token_files_are_refused_by_name(tmp_path, tokenizer, documents):
    tokenize(documents, tokenizer, tmp_path / "tokens", HALF)
    for name in ("train.tokens", "val.index.safetensors"):
        path = tmp_path / "tokens" / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
        with pytest.raises(BadData, match=rf"{name} was altered"):
            open_tokens(tmp_path / "tokens" / f"{name.split('.')[0]}.tokens")
        path.write_bytes(raw)
