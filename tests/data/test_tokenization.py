"""Documents become token files of two splits, the same with any workers, encoder and interruptions."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compactgpt.common.errors import BadData
from compactgpt.common.storage import atomic_folder, sha256_file, verified_manifest
from compactgpt.config import Tokenization
from compactgpt.data import documents as documents_module
from compactgpt.data import tokenization
from compactgpt.data.documents import Document, RowGroup, new_document
from compactgpt.data.token_files import open_tokens
from compactgpt.data.tokenization import SplitRule
from compactgpt.data.tokenizer import load_encoding
from tests.support.tiny_corpus import EOT, make_documents, make_tokenizer

HALF = Tokenization(val_fraction=0.5)
ODD = "\0nul\x7f\ufeff\ufffd\U0010ffff\u088f é\u0301 <|endoftext|> \U000323b0's"
TEXTS = [f"document {n} says hello world, {n * n} times\n{ODD if n % 9 == 0 else ''}" for n in range(60)]
SPLITS = ("train", "val")


def tokenize(documents, tokenizer, folder, params=HALF, *, num_workers=1, **kwargs):
    state = folder.parent / "state"
    return tokenization.tokenize(
        documents, tokenizer, folder, params, num_workers=num_workers, state=state, **kwargs
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "ROW_GROUP_BYTES", 200)
    return make_documents(tmp_path / "documents", TEXTS, shard_bytes=500)  # five shards or more


@pytest.mark.parametrize(
    ("document_id", "fraction", "in_val"),
    [("3fffffffffffffff", 0.25, True), ("4000000000000000", 0.25, False), ("0" * 16, 1e-9, True)],
)
def test_a_document_is_in_val_if_its_id_as_a_fraction_is_small(document_id, fraction, in_val):
    document = Document(document_id + "0" * 16, "", "")
    assert SplitRule(fraction).in_val(RowGroup(Path("x"), 0), [document]) == [in_val]


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9])
def test_with_tail_val_is_the_end_of_the_corpus_at_whole_documents(tmp_path, tokenizer, documents, fraction):
    params = Tokenization(val_fraction=fraction, split="tail")
    report = tokenize(documents, tokenizer, tmp_path / "tokens", params)
    found = {split: open_tokens(tmp_path / "tokens" / f"{split}.tokens") for split in SPLITS}
    ids = [new_document(text, "").id for text in TEXTS]
    assert found["train"].document_ids + found["val"].document_ids == ids
    sizes = [len(text.encode()) for text in TEXTS]
    first = found["train"].header.documents  # of val
    assert sum(sizes[first + 1 :]) < fraction * sum(sizes) <= sum(sizes[first:])
    assert report["split"] == verified_manifest(tmp_path / "tokens")["split"] == "tail"


def test_every_document_is_in_one_split_in_order_and_decodes_to_its_text(tmp_path, tokenizer, documents):
    report = tokenize(documents, tokenizer, tmp_path / "tokens")
    encoding = load_encoding(tokenizer)
    every = [new_document(text, "") for text in TEXTS]
    for split in SPLITS:
        expected = [each for each in every if (int(each.id, 16) < 2**127) == (split == "val")]
        file = open_tokens(tmp_path / "tokens" / f"{split}.tokens")
        assert file.document_ids == [each.id for each in expected]
        decoded = [encoding.decode(file.document(n).tolist()) for n in range(len(expected))]
        assert decoded == [each.text for each in expected]
        assert np.count_nonzero(file.tokens == EOT) == len(expected)  # none inside of a document
        assert report[split] == {
            "documents": len(expected),
            "tokens": sum(len(encoding.encode_ordinary(each.text)) + 1 for each in expected),
            "bytes": sum(len(each.text.encode()) for each in expected),
            "sha256": sha256_file(file.path),
        }


def test_the_files_are_the_same_with_any_workers_and_encoder(tmp_path, tokenizer, documents):
    slow = Tokenization(val_fraction=0.5, encoder="tiktoken")
    found = []
    for params, num_workers in [(HALF, 1), (HALF, 3), (slow, 1)]:
        report = tokenize(documents, tokenizer, tmp_path / "tokens", params, num_workers=num_workers)
        found.append((report, contents(tmp_path / "tokens")))
    assert found[0] == found[1] == found[2]


def test_a_split_without_documents_is_refused_and_the_old_files_stay(tmp_path, tokenizer, documents):
    tokenize(documents, tokenizer, tmp_path / "tokens")
    before = contents(tmp_path / "tokens")
    for fraction, empty in [(1e-9, "val"), (1 - 1e-9, "train")]:
        with pytest.raises(BadData, match=f"{empty} has none of the 60 documents: .*val_fraction"):
            tokenize(documents, tokenizer, tmp_path / "tokens", Tokenization(val_fraction=fraction))
    assert contents(tmp_path / "tokens") == before


# --- interrupted runs


def interrupt(done, total):
    if done > total // 2:
        raise KeyboardInterrupt


def test_an_interrupted_run_resumes_after_its_finished_shards_and_gives_the_same_bytes(
    tmp_path, monkeypatch, tokenizer, documents
):
    with pytest.raises(KeyboardInterrupt):
        tokenize(documents, tokenizer, tmp_path / "tokens", progress=interrupt)
    assert not (tmp_path / "tokens").exists()
    (chunks,) = (tmp_path / "state").iterdir()
    damaged = chunks / "documents-00001/train.tokens"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    read = Mock(side_effect=tokenization.read_row_group)
    monkeypatch.setattr(tokenization, "read_row_group", read)
    tokenize(documents, tokenizer, tmp_path / "tokens")
    shards = {call.args[0].path.stem for call in read.call_args_list}
    assert "documents-00001" in shards
    assert "documents-00000" not in shards
    tokenize(documents, tokenizer, tmp_path / "complete")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "complete")
    assert list((tmp_path / "state").iterdir()) == []


def test_chunks_of_other_inputs_are_deleted(tmp_path, tokenizer, documents):
    found = []
    for params in (HALF, Tokenization(val_fraction=0.4)):
        with pytest.raises(KeyboardInterrupt):
            tokenize(documents, tokenizer, tmp_path / "tokens", params, progress=interrupt)
        found += (tmp_path / "state").iterdir()
    assert len(set(found)) == len(found) == 2


def test_a_shard_that_is_not_utf8_is_refused_by_name(tmp_path, tokenizer):
    buffers = [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"a\xed\xa0")]
    columns = {"id": ["00" * 16], "text": pa.Array.from_buffers(pa.string(), 1, buffers), "source": ["x"]}
    with atomic_folder(tmp_path / "documents", {"documents": 1, "bytes": 3}) as temporary:
        pq.write_table(pa.table(columns), temporary / "documents-00000.parquet")
    with pytest.raises(BadData, match=r"documents-00000\.parquet is damaged .*UTF8"):
        tokenize(tmp_path / "documents", tokenizer, tmp_path / "tokens")
