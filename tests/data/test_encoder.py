"""The fast encoder's ids are tiktoken's, and those of text in parts are those of the whole."""

import random
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from compactgpt.common.errors import BadData
from compactgpt.data import encoder
from compactgpt.data.encoder import GigatokenEncoder, TiktokenEncoder
from compactgpt.data.encoding import GPT2_PATTERN, save_gpt2
from tests.support.tiny_corpus import make_tokenizer

WHEELS = Path(__file__).parents[2] / ".state" / "wheels"
VOCAB_BPE = WHEELS / "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = WHEELS / "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
NEW = {code for first, last in encoder.NEW_IN_UNICODE_17 for code in range(first, last + 1)}
# What the pattern treats in ways of its own: apostrophes, white space of all kinds, classes beyond ASCII.
ODD = [
    *"'sdmtlverSLax09!-~_\\`@[{ \t\n\r\v\f\0\x1c\x1f\x7f\x85\xa0",
    *"\u1680\u180e\u2003\u2028\u202f\u205f\u3000\u200b\ufeff\u0301\u0e33\u0661\u0967\u00b2\u2160\u3007",
    *"日本語です。、,\uff01\uff1fㄱ한글éßДא😀🇫\U0001d7ce\U0010ffff\ufffd\u0378\u088f\ua7ce\U000323b0\U0001e6c0",
    *["'s", "'ll", "'ve", "'re", "  ", "\n\n", " '", "<|endoftext|>", "''", "'S"],
]
odd_text = st.one_of(st.lists(st.sampled_from(ODD), max_size=60).map("".join), st.text(max_size=60))


def all_pairs() -> tiktoken.Encoding:
    """A token for every two bytes: where the pattern cuts shows in the ids.

    First those that join a probe (a, 1 or !) and the next character's first byte, the others in no order.
    """
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    random.Random(1).shuffle(pairs)
    pairs.sort(key=lambda pair: pair[0] not in b"a1!" or pair[1] < 128)
    tokens = [bytes([byte]) for byte in range(256)] + pairs
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "pairs", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


@pytest.fixture(scope="module")
def pairs():
    return GigatokenEncoder(all_pairs())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    if not VOCAB_BPE.exists():
        pytest.skip("GPT-2's files are not fetched")
    folder = tmp_path_factory.mktemp("gpt2") / "tokenizer"
    save_gpt2(folder, VOCAB_BPE.read_bytes(), ENCODER_JSON.read_bytes())
    return encoder.load_encoder(folder, "gigatoken")


def ids(which, text: str) -> list[int]:
    return np.concatenate([[], *which.encode(memoryview(text.encode()))]).astype(int).tolist()


@pytest.mark.slow
def test_both_libraries_see_the_same_class_in_every_code_point_but_the_new_ones(pairs):
    reference = TiktokenEncoder(pairs.encoding)
    codes = [
        code
        for code in range(0x110000)  # planes 4 to 13 have no character: one in 997 will do
        if not 0xD800 <= code < 0xE000 and (code < 0x40000 or 0xE0000 <= code < 0xE1000 or code % 997 == 0)
    ]
    seen_new = set()
    for probe in ("a", "1", "!"):
        for start in range(0, len(codes), 8192):
            block = codes[start : start + 8192]
            text = "\n".join(probe + chr(code) for code in block if code not in NEW).encode()
            np.testing.assert_array_equal(pairs._fast.encode(text), reference.encode_span(text))
        for code in NEW:
            text = (probe + chr(code)).encode()
            if pairs._fast.encode(text).tolist() != reference.encode_span(text).tolist():
                seen_new.add(code)
    assert len(seen_new) > len(NEW) * 0.95  # the list is no longer than it must be


def test_text_with_a_new_code_point_is_recognized():
    assert all(encoder._is_new(f"text {chr(code)} text".encode()) for code in NEW)
    assert not encoder._is_new("naïve “quotes” 日本語です。 😀 🇫🇷".encode())


@given(text=odd_text)
@settings(max_examples=400, deadline=None)
def test_ids_are_tiktokens_whatever_the_text(pairs, text):
    assert ids(pairs, text) == pairs.encoding.encode_ordinary(text)


@given(text=odd_text)
@settings(max_examples=200, deadline=None)
def test_ids_of_gpt2_are_tiktokens_whatever_the_text(gpt2, text):
    assert ids(gpt2, text) == gpt2.encoding.encode_ordinary(text)


def test_known_ids_of_gpt2(gpt2):
    assert ids(gpt2, "The future of AI is") == [464, 2003, 286, 9552, 318]


@given(text=odd_text)
@settings(max_examples=400, deadline=None)
def test_every_safe_cut_is_safe(pairs, text):
    raw = text.encode()
    pieces = regex.findall(GPT2_PATTERN, text)
    for match in encoder._SAFE_CUT.finditer(raw):
        left, right = raw[: match.start()].decode(), raw[match.start() :].decode()
        assert regex.findall(GPT2_PATTERN, left) + regex.findall(GPT2_PATTERN, right) == pieces
        halves = pairs.encoding.encode_ordinary(left) + pairs.encoding.encode_ordinary(right)
        assert halves == pairs.encoding.encode_ordinary(text)


@pytest.mark.parametrize("kind", [GigatokenEncoder, TiktokenEncoder])
@given(text=odd_text, span=st.integers(1, 40))
@settings(max_examples=250, deadline=None)
def test_ids_of_spans_are_the_ids_of_the_whole(pairs, kind, text, span):
    which = pairs if kind is GigatokenEncoder else TiktokenEncoder(pairs.encoding)
    raw = memoryview(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "SPAN_BYTES", span)
        found = list(encoder.spans(raw))
        assert b"".join(found) == raw
        assert all(found) or not raw
        assert ids(which, text) == pairs.encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    ["word " * 9000, "one\nword\n\n" * 4000, "don't we'll " * 4000, "\0nul " * 9000, "今日は\n" * 4500],
)
def test_long_text_is_encoded_in_spans(pairs, monkeypatch, text):
    monkeypatch.setattr(encoder, "SPAN_BYTES", 4096)
    assert len(list(encoder.spans(memoryview(text.encode())))) >= 9
    assert ids(pairs, text) == pairs.encoding.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", "7", "-", " ", "\n", "é", "a1"])
def test_a_run_of_one_kind_is_whole_up_to_a_limit_and_refused_beyond(pairs, monkeypatch, unit):
    monkeypatch.setattr(encoder, "SPAN_BYTES", 64)
    monkeypatch.setattr(encoder, "LONGEST_RUN_BYTES", 1024)
    text = "word " + unit * (1000 // len(unit.encode()))
    assert ids(pairs, text) == pairs.encoding.encode_ordinary(text)
    with pytest.raises(BadData, match=r"there are 960 bytes without a change from text to white space"):
        ids(pairs, "word " + unit * 2000)


def test_special_tokens_in_text_are_ordinary(pairs):
    assert pairs.encoding.eot_token not in ids(pairs, "a <|endoftext|> b<|endoftext|>")


def test_what_gigatoken_remembers_is_dropped_and_nothing_changes(pairs, monkeypatch):
    monkeypatch.setattr(encoder, "CHECK_EVERY_BYTES", 1)
    monkeypatch.setattr(encoder, "CACHE_BYTES", -(2**60))
    which = GigatokenEncoder(pairs.encoding)
    first = which._fast
    assert ids(which, "hello wide world") == pairs.encoding.encode_ordinary("hello wide world")
    assert which._fast is not first


def test_other_ids_than_tiktokens_stop_the_work(pairs, monkeypatch):
    monkeypatch.setattr(encoder, "CHECK_EVERY_BYTES", 10)
    which = GigatokenEncoder(pairs.encoding)

    class Wrong:
        def encode(self, part):
            return np.zeros(len(part), np.uint32)

    which._fast = Wrong()
    with pytest.raises(BadData, match=r"tokenization\.encoder to tiktoken .* begins 'hello"):
        ids(which, "hello wide world")


def test_tiktoken_stands_in_where_gigatoken_cannot(tmp_path, monkeypatch):
    folder = make_tokenizer(tmp_path / "tokenizer")
    assert isinstance(encoder.load_encoder(folder, "gigatoken"), GigatokenEncoder)
    assert isinstance(encoder.load_encoder(folder, "tiktoken"), TiktokenEncoder)
    monkeypatch.setattr(encoder, "_has_gigatoken", lambda: False)
    assert isinstance(encoder.load_encoder(folder, "gigatoken"), TiktokenEncoder)


def test_another_pattern_is_never_cut(monkeypatch):
    monkeypatch.setattr(encoder, "SPAN_BYTES", 4)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"b c": 256, b" c": 257}
    other = tiktoken.Encoding(
        "other", pat_str=r".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    assert ids(TiktokenEncoder(other), "ab cd ab cd") == other.encode_ordinary("ab cd ab cd")
