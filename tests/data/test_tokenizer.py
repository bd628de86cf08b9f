"""The tokenizer's folder is checked when it is loaded, and both encoders give tiktoken's ids."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.data import tokenizer
from compactgpt.data.tokenizer import GigatokenEncoder, encode, load_encoder, load_encoding, save_gpt2
from tests.support.tiny_corpus import EOT, make_tokenizer, tokenizer_files

WHEELS = Path(__file__).parents[2] / ".state" / "wheels"
VOCAB_BPE = WHEELS / "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = WHEELS / "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# What the pattern treats in a special way: apostrophes, all kinds of white space, letters beyond ASCII.
ODD = [
    *"'sdmtlverSLax09!-~_\\`@[{ \t\n\r\v\f\0\x1c\x1f\x7f\x85\xa0",
    *"\u1680\u180e\u2003\u2028\u202f\u205f\u3000\u200b\ufeff\u0301\u0e33\u0661\u0967\u00b2\u2160\u3007",
    *"日本語です。、,\uff01\uff1fㄱ한글éßДא😀🇫\U0001d7ce\U0010ffff\ufffd\u0378\u088f\ua7ce\U000323b0\U0001e6c0",
    *["'s", "'ll", "'ve", "'re", "  ", "\n\n", " '", "<|endoftext|>", "''", "'S"],
]
odd_text = st.one_of(st.lists(st.sampled_from(ODD), max_size=60).map("".join), st.text(max_size=60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


# --- the folder


def test_a_hand_worked_text_and_the_ranks_and_pattern_of_tiktoken(tiny, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    h, e, hell, hello, space_w = ord("h") - 33, ord("e") - 33, 258, 259, 260
    found = load_encoding(tiny)
    assert found.encode_ordinary("hello wh ehhell") == [hello, space_w, h, ord(" ") + 188, e, h, hell]
    assert (found.eot_token, found.n_vocab) == (EOT, 262)
    expected = data_gym_to_mergeable_bpe_ranks(str(tiny / "vocab.bpe"), str(tiny / "encoder.json"))
    assert found._mergeable_ranks == expected
    assert found._pat_str == openai_public.r50k_pat_str


def test_known_ids_of_gpt2(tmp_path):
    if not VOCAB_BPE.exists():
        pytest.skip("GPT-2's files are not fetched")
    save_gpt2(tmp_path / "gpt2", VOCAB_BPE.read_bytes(), ENCODER_JSON.read_bytes())
    found = load_encoding(tmp_path / "gpt2")
    assert (found.n_vocab, found.eot_token) == (50257, 50256)
    fast = load_encoder(tmp_path / "gpt2", "gigatoken")
    assert fast("The future of AI is").tolist() == [464, 2003, 286, 9552, 318]


def test_a_damaged_altered_or_missing_tokenizer_is_refused(tmp_path):
    vocab_bpe, encoder_json = tokenizer_files()
    twice = json.dumps(json.loads(encoder_json) | {"hello": 0}).encode()
    for damaged in (twice, encoder_json[:-8], b"\xff", b"[]", b'{"\u4e00": 0}', b'{"a": "b"}'):
        with pytest.raises(BadData, match=r"encoder\.json is not a file of GPT-2's tokenizer"):
            save_gpt2(tmp_path / "tokenizer", vocab_bpe, damaged)
    folder = make_tokenizer(tmp_path / "tokenizer")
    (folder / "vocab.bpe").write_bytes(vocab_bpe.replace(b"l l", b"l o"))
    with pytest.raises(BadData, match=r"vocab\.bpe was altered"):
        load_encoding(folder)
    with pytest.raises(MissingInput, match="dvc repro"):
        load_encoding(tmp_path / "nothing")


# --- encoding


@pytest.fixture(scope="module")
def pairs():
    """An encoder with a token for every two bytes: each cut of the pattern shows in the ids.

    The tokens that join a probe (a, 1 or !) and the next character's first byte have the lowest ranks.
    """
    every = [bytes([first, second]) for first in range(256) for second in range(256)]
    random.Random(1).shuffle(every)
    every.sort(key=lambda pair: pair[0] not in b"a1!" or pair[1] < 128)
    tokens = [bytes([byte]) for byte in range(256)] + every
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {"<|endoftext|>": len(ranks)}
    pattern = openai_public.r50k_pat_str
    encoding = tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return GigatokenEncoder(encoding)


@pytest.mark.slow
def test_both_libraries_agree_on_every_character_that_goes_to_gigatoken(pairs):
    """gigatoken and tiktoken know different versions of Unicode: new characters must go to tiktoken."""
    characters = [
        chr(code)
        for code in range(0x110000)  # planes 4 to 13 have no character: one in 997 will do
        if not 0xD800 <= code < 0xE000 and (code < 0x40000 or 0xE0000 <= code < 0xE1000 or code % 997 == 0)
    ]
    fast = [each for each in characters if not tokenizer._MAY_BE_NEW.search(each.encode())]
    assert len(fast) > 0.8 * len(characters)
    for probe in ("a", "1", "!"):
        for start in range(0, len(fast), 8192):
            text = "\n".join(probe + each for each in fast[start : start + 8192])
            np.testing.assert_array_equal(pairs._fast.encode(text.encode()), encode(pairs.encoding, text))


@given(text=odd_text)  # gigatoken starts again after each text
@settings(max_examples=400, deadline=None)
def test_ids_are_tiktokens_whatever_the_text(pairs, text):
    pairs._bytes_since_start = tokenizer.RESTART_EVERY_BYTES
    expected = pairs.encoding.encode_ordinary(text)
    assert pairs.encode(text).tolist() == encode(pairs.encoding, text).tolist() == expected
    assert pairs.encoding.decode(expected) == text


def test_ids_that_differ_from_tiktokens_stop_the_stage(pairs):
    encoder = GigatokenEncoder(pairs.encoding)
    encoder._fast = SimpleNamespace(encode=lambda text: np.zeros(len(text), np.uint32))
    with pytest.raises(BadData, match=r"begins 'hello.* tokenization\.encoder to tiktoken"):
        encoder.encode("hello wide world")


def test_text_that_tiktoken_cannot_encode_is_one_sentence(tiny):
    """The regular expression of tiktoken fails at a million spaces in a row."""
    with pytest.raises(BadData, match="can't encode a document that begins 'a   "):
        load_encoder(tiny, "tiktoken")("a" + " " * 1_100_000 + "b")
