r"""UTF-8 bytes -> token ids: exactly tiktoken's, an order of magnitude faster, in bounded memory.

Two ways give the same ids. tiktoken is the reference and reads every encoding. gigatoken reads GPT-2's
pattern 14 times as fast (docs/benchmarks.md), and is used where it is installed. Its tables of letters
and digits are those of Unicode 17, tiktoken's those of Unicode 16: text with one of the code points in
between goes through tiktoken. tests/data/test_encoder.py asks both for the class of every code point.

Long text is cut before white space that follows another character, where GPT-2's pattern

    '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s

can't match across the cut, so that the ids of the spans are the ids of the whole: no alternative runs on
from another character to white space, and the left part's white space is all inside it, where `$` and
`(?!\S)` see what they saw.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from compactgpt.common.errors import BadData
from compactgpt.data.encoding import GPT2_PATTERN, _ranks_bytes, load_encoding

Ids = npt.NDArray[np.uint32]
SPAN_BYTES = 2**20  # of text, encoded in one call
LONGEST_RUN_BYTES = 2**22  # of text without a safe cut: encoding takes seconds and twenty times its size
CACHE_BYTES = 2**27  # gigatoken remembers every word that it met: beyond this it starts anew
CHECK_EVERY_BYTES = 2**20  # of text
CHECK_BYTES = 2**11  # of them are compared with tiktoken's

# Code points that Unicode 17 made letters or digits.
NEW_IN_UNICODE_17 = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4),
    (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9),
    (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E),
    (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
_SAFE_CUT = re.compile(
    # Any character but white space (Unicode's beyond ASCII too), then white space.
    rb"(?<!\s)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe1\xa0\x8e)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\v\f\r])"
)


def _utf8_prefixes() -> bytes:
    """Spell NEW_IN_UNICODE_17 as alternatives of UTF-8: whole where short, else without the last byte."""
    cut = {3: 3, 4: 3}
    spelled = (chr(code).encode() for first, last in NEW_IN_UNICODE_17 for code in range(first, last + 1))
    return b"|".join(sorted({re.escape(each[: cut.get(len(each), 2)]) for each in spelled}))


_NEW = re.compile(_utf8_prefixes())
_NEW_LEADS = sorted({chr(first).encode()[:1] for first, _ in NEW_IN_UNICODE_17})


def _is_new(part: bytes) -> bool:
    """Tell whether text may hold one of NEW_IN_UNICODE_17; searching for plain bytes first is faster."""
    if part.isascii():
        return False
    rare = any(lead in part for lead in _NEW_LEADS[:-1])
    astral = part.count(b"\xf0") != part.count(b"\xf0\x9f")  # \xf0\x9f opens the emoji
    return (rare or astral) and _NEW.search(part) is not None


class UnencodableText(BadData):
    """A text that can't be cut: the message says where in the text, the caller adds which document."""


class Encoder(Protocol):
    """Turns the text of one document into ids."""

    encoding: tiktoken.Encoding

    def encode(self, text: memoryview) -> Iterator[Ids]:
        """Yield the ids of UTF-8 text, span by span. No special token is ever among them."""


class TiktokenEncoder:
    """The reference."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    def encode(self, text: memoryview) -> Iterator[Ids]:
        """Yield the ids of UTF-8 text, span by span."""
        known = self.encoding._pat_str == GPT2_PATTERN  # another pattern may match across our cuts
        yield from map(self.encode_span, spans(text) if known else [bytes(text)])

    def encode_span(self, span: bytes) -> Ids:
        """Encode as ordinary text, without a Python list in between."""
        return self.encoding.encode_to_numpy(str(span, "utf-8"), disallowed_special=())


class GigatokenEncoder:
    """The fast one, for GPT-2's pattern; a sample of what it does is compared with the reference."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self._reference = TiktokenEncoder(encoding)
        self._unchecked = CHECK_EVERY_BYTES  # the first text is compared
        self._start()

    def _start(self) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_ranks_bytes(self.encoding._mergeable_ranks))
            file.flush()
            self._fast: Any = BPETokenizer.from_tiktoken(file.name, "gpt2")
        self._allowance = _resident_bytes() + CACHE_BYTES

    def encode(self, text: memoryview) -> Iterator[Ids]:
        """Yield the ids of UTF-8 text, span by span.

        Raises:
            BadData: the ids of a sample are not tiktoken's.
        """
        for span in spans(text):
            yield self._reference.encode_span(span) if _is_new(span) else self._fast.encode(span)
            self._unchecked += len(span)
            if self._unchecked >= CHECK_EVERY_BYTES:
                self._unchecked = 0
                self._check(span[:CHECK_BYTES])
                if _resident_bytes() > self._allowance:
                    self._start()  # without the words that it remembered

    def _check(self, sample: bytes) -> None:
        whole = str(sample, "utf-8", "ignore").encode()  # its end may lie within a character
        if _is_new(whole) or np.array_equal(self._fast.encode(whole), self._reference.encode_span(whole)):
            return
        raise BadData(
            "gigatoken's ids differ from tiktoken's: set tokenization.encoder to tiktoken in params.yaml, "
            f"and report the text, which begins {str(whole[:80], 'utf-8', 'ignore')!r}"
        )


def load_encoder(tokenizer: Path, choice: Literal["gigatoken", "tiktoken"]) -> Encoder:
    """Build the encoder of an encoding folder.

    Args:
        tokenizer: folder of the encoding.
        choice: gigatoken stands back where it isn't installed, or the pattern isn't GPT-2's.

    Raises:
        MissingInput, BadData: the folder is missing or damaged.
    """
    encoding = load_encoding(tokenizer)
    if choice == "gigatoken" and encoding._pat_str == GPT2_PATTERN and _has_gigatoken():
        return GigatokenEncoder(encoding)
    return TiktokenEncoder(encoding)


def _has_gigatoken() -> bool:
    from importlib.util import find_spec

    return find_spec("gigatoken") is not None


def spans(text: memoryview) -> Iterator[bytes]:
    """Cut text for GPT-2's pattern into spans whose ids, one after another, are the ids of the whole.

    Yields:
        SPAN_BYTES each or a little more.

    Raises:
        UnencodableText: there is no white space in LONGEST_RUN_BYTES.
    """
    start = 0
    while len(text) - start > SPAN_BYTES:
        end = start + LONGEST_RUN_BYTES
        if match := _SAFE_CUT.search(text, start + SPAN_BYTES, end):
            yield bytes(text[start : match.start()])
            start = match.start()
        elif end < len(text):
            raise UnencodableText(
                f"from byte {start + SPAN_BYTES + 1:,} on there are {LONGEST_RUN_BYTES - SPAN_BYTES:,} bytes "
                "without a change from text to white space: remove the document, or break its lines"
            )
        else:
            break
    yield bytes(text[start:])


def _resident_bytes() -> int:
    """Memory of this process, where Linux tells it; elsewhere 0, and the cache is never dropped."""
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return 0
    import resource

    return int(fields[1]) * resource.getpagesize()
