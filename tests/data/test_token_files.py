"""Token files, training batches and evaluation windows, compared with bytes and loops written by hand."""

import json

import numpy as np
import pytest

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import atomic_folder
from compactgpt.data import token_files
from tests.support.tiny_corpus import write_token_file

IDS = [bytes([n]) * 16 for n in range(3)]
DOCUMENTS = [(IDS[0], 5, np.array([1, 2, 3])), (IDS[1], 0, np.array([], int)), (IDS[2], 9, np.array([4]))]


def write(path, documents=DOCUMENTS, vocab_size=300, eot_token=299):
    write_token_file(path, documents, vocab_size=vocab_size, eot_token=eot_token, tokenizer_sha256="ab" * 32)


def test_the_bytes_on_disk_are_the_documented_ones_and_are_read_back(tmp_path):
    write(tmp_path / "val.tokens")
    raw = (tmp_path / "val.tokens").read_bytes()
    assert raw.startswith(b"CGPTTOK\n")
    header = {"version": 1, "dtype": "uint16", "tokens": 7, "documents": 3, "vocab_size": 300}
    header |= {"eot_token": 299, "tokenizer_sha256": "ab" * 32}
    assert raw[8:1024] == json.dumps(header, sort_keys=True).encode().ljust(1015) + b"\n"
    assert np.frombuffer(raw[1024:], "<u2").tolist() == [1, 2, 3, 299, 299, 4, 299]
    split = token_files.open_tokens(tmp_path / "val.tokens")
    assert split.header.model_dump() == header
    assert [split.document(n).tolist() for n in range(3)] == [[1, 2, 3], [], [4]]
    assert split.byte_lengths.tolist() == [5, 0, 9]
    assert split.document_ids == ["00" * 16, "01" * 16, "02" * 16]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_smallest_type_that_holds_every_id_is_used(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    write(tmp_path / "a.tokens", [(IDS[0], 1, np.array([top]))], vocab_size, top)
    split = token_files.open_tokens(tmp_path / "a.tokens")
    assert split.header.dtype == dtype
    assert split.tokens.tolist() == [top, top]


@pytest.mark.parametrize("suffix", [".tokens", ".index.safetensors"])
def test_a_missing_file_or_one_that_differs_from_its_manifest_is_refused_by_name(tmp_path, suffix):
    with atomic_folder(tmp_path / "tokens") as temporary:
        write(temporary / "val.tokens")
    path = (tmp_path / "tokens/val.tokens").with_suffix(suffix)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadData, match=rf"val{suffix} was altered"):
        token_files.open_tokens(tmp_path / "tokens/val.tokens")
    path.unlink()
    with pytest.raises(MissingInput, match=rf"val{suffix} is missing: run `dvc repro tokenization`"):
        token_files.open_tokens(tmp_path / "tokens/val.tokens")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],  # half a token
        lambda raw: raw[:-2],
        lambda raw: raw[:100],
        lambda raw: b"PK" + raw[2:],
        lambda raw: raw.replace(b'"version": 1', b'"version": 2'),
        lambda raw: raw.replace(b'"documents": 3', b'"documents": 2'),
    ],
)
def test_a_damaged_file_without_a_manifest_is_refused(tmp_path, damage):
    path = tmp_path / "val.tokens"
    write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadData, match=r"val\.tokens or val\.index\.safetensors is damaged"):
        token_files.open_tokens(path)


def batch(step, seed=1, length=100):
    tokens = np.arange(length)
    return token_files.training_batch(tokens, seed=seed, step=step, sequences=8, block_size=5)


def test_a_batch_is_a_function_of_seed_and_step_and_its_targets_are_the_next_tokens():
    tokens, targets = batch(step=3)
    assert tokens.shape == targets.shape == (8, 5)
    assert tokens.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(targets, tokens + 1)
    np.random.seed(0)
    np.testing.assert_array_equal(tokens, batch(step=3)[0])
    assert not np.array_equal(tokens, batch(step=4)[0])
    assert not np.array_equal(tokens, batch(step=3, seed=2)[0])


def test_a_sequence_can_start_at_every_position_of_the_stream():
    assert {int(row[0]) for step in range(200) for row in batch(step, length=10)[0]} == {0, 1, 2, 3, 4}
    with pytest.raises(BadData, match=r"has 5 tokens, but one sequence needs 6.*block_size"):
        batch(step=0, length=5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2, [(0, [299, 1], [1, 2]), (0, [2], [3]), (2, [299], [4])]),
        (3, [(0, [299, 1, 2], [1, 2, 3]), (2, [299], [4])]),
    ],
)
def test_every_token_is_a_target_of_one_window_in_order(tmp_path, size, expected):
    write(tmp_path / "a.tokens")
    windows = token_files.evaluation_windows(token_files.open_tokens(tmp_path / "a.tokens"), size)
    assert [(w.document, w.tokens.tolist(), w.targets.tolist()) for w in windows] == expected
