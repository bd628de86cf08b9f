"""A long text file is cut into documents, and no text is lost."""

import gzip
import re
import subprocess
import sys
from io import BytesIO

import pytest

from compactgpt.common.errors import BadData
from compactgpt.data.splitting import split_text
from tests.support.corpora import ROOT, download_params

PARAGRAPH = "One sentence of a paragraph.\nAnd another one, of the same.\n"


def split(text, max_characters=10**6, **changes):
    changes = {"split_characters": 100, "split_over_characters": 1000} | changes
    params = download_params(files=changes).files
    content = text if isinstance(text, bytes) else text.encode()
    return list(split_text(BytesIO(content), "a.txt", params, max_characters))


@pytest.mark.parametrize(
    ("way", "text", "expected"),
    [
        ("blank-lines", "\n\na\nb\n\n \n  c\n\nd", [(3, "a\nb"), (7, "  c"), (9, "d")]),
        ("blank-lines", "a\r\nb\r\n\r\nc\r\n", [(1, "a\r\nb"), (4, "c")]),
        ("blank-lines", f"{'x' * 199} \nb\n", [(1, f"{'x' * 199} \nb")]),  # a long line's end is not blank
        ("lines", "\ufeffa\n\n b \r\nc", [(1, "a"), (3, " b"), (4, "c")]),
        ("heading", "begin\n# A\na\n#b\n# C", [(1, "begin"), (2, "# A\na\n#b"), (5, "# C")]),
        ("none", " a\n\nb\n", [(0, " a\n\nb\n")]),
        ("auto", "\ufeff" + "é" * 1000, [(0, "é" * 1000)]),
    ],
)
def test_documents_begin_where_params_say(way, text, expected):
    assert [piece[:2] for piece in split(text, split=way, heading="# ")] == expected


@pytest.mark.parametrize(
    ("text", "way", "longest"),
    [
        (f"{PARAGRAPH}\n" * 200 + "End.", "blank lines", 100 + len(PARAGRAPH) + 5),  # a short end is joined
        (f"{PARAGRAPH}\n" * 20 + PARAGRAPH * 200, "blank lines", 1000 + len(PARAGRAPH)),
        (PARAGRAPH * 200, "size", 160),
        ("word " * 4000, "size", 300),  # text8 is one line
        ("字" * 4000, "size", 300),
    ],
)
def test_auto_cuts_any_text_into_documents_of_a_sensible_length(text, way, longest):
    pieces = split(text)
    assert {piece.cut for piece in pieces} == {f"{way}, of at least 100 characters"}
    assert min(len(piece.text) for piece in pieces) >= 99
    assert max(len(piece.text) for piece in pieces) <= longest
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join(text.split())
    assert [piece.line for piece in pieces] == sorted(piece.line for piece in pieces)


def test_a_piece_over_the_limit_ends_the_reading_soon():
    pieces = split("a\n" * 10_000, max_characters=100, split="heading", heading="# ")
    assert len(pieces[0].text) == 101


@pytest.mark.parametrize("text", [b"a\n" * 2000 + b"b \xff", b"a\n" * 2000 + "é".encode()[:1]])
@pytest.mark.parametrize("way", ["auto", "none"])
def test_a_byte_that_is_not_utf8_is_named_with_its_line(text, way):
    with pytest.raises(BadData, match=r"a\.txt, line 2,001: byte 0x(ff|c3) is not UTF-8"):
        split(text, split=way)


READ_100_MB = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from compactgpt.common.errors import BadData
from compactgpt.data.text_files import read_file
from tests.support.corpora import download_params
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = sum(1 for _ in read_file(Path(sys.argv[1]), sys.argv[2], download_params(max_row_megabytes=3)))
except BadData as error:
    found = str(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("enwik8.txt", PARAGRAPH * 4 + "\n", r"\d{5}$"),
        ("text8.txt", "word " * 100, r"\d{5}$"),
        ("a.jsonl.gz", "x" * 1000, r"a\.jsonl\.gz, line 1 is longer than 3 MB"),
    ],
)
def test_100_mb_are_read_in_bounded_memory(tmp_path, name, text, found):
    content = text.encode() * (1_000_000 // len(text))
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(content) * 100)
    done = subprocess.run(
        [sys.executable, "-c", READ_100_MB, str(tmp_path), name],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/src"},
    )  # fmt: skip
    kilobytes, _, result = done.stdout.strip().partition(" ")
    assert re.match(found, result)
    assert int(kilobytes) < 20_000
