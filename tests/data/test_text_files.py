"""The user's own text becomes documents, or a message names the file and the line that is wrong."""

import gzip
import json
import os
import re
import shlex
import shutil
import tempfile
from functools import partial
from io import BytesIO
from random import Random
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from compactgpt.common.console import silent
from compactgpt.common.errors import BadData, DiskFull, MissingInput
from compactgpt.common.storage import write_bytes
from compactgpt.config import FILE_KINDS
from compactgpt.data import text_files
from tests.support.corpora import ROOT, download_params, write_corpus

COMPRESS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def files(*patterns, **changes):
    return download_params(corpus="files", files={"patterns": list(patterns), **changes})


def parquet_bytes(*texts, names=("text",), compression="snappy"):
    """A parquet file with a row group for each list of texts, and the list in each column of `names`."""
    tables = [pa.Table.from_arrays([pa.array(each)] * len(names), names=names) for each in texts]
    with pq.ParquetWriter(sink := BytesIO(), tables[-1].schema, compression=compression) as writer:
        for table in tables:
            writer.write_table(table.cast(tables[-1].schema))
    return sink.getvalue()


LONG = b"x" * 1_000_001
INVALID_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
)


def test_text_of_every_kind_of_file_is_taken_as_it_is(tmp_path):
    contents = {
        "a.txt": "One",
        "b.txt": "\ufeffTwo\r\nlines é\0\n",
        "c.jsonl": '{"text": "in \\u00e9 json", "n": 1}\n\n{"text": "  "}\n{"text": "end"}',
        "d.csv": '\ufeffid,text\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2,plain\r\n',
        "e.csv": "text;n\na, b;1\n",
        "f.csv": "n\ttext\n1\twith tab\n",
        "g.json": '\ufeff [\n{"n": 1, "text": "object"},\n"string é"]',
        "h.json": '{"text": "one per line"}\n{"text": "as of some exports"}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
    rows = parquet_bytes([], ["row one", "One"], names=("other", "text"))
    (tmp_path / "i.parquet").write_bytes(rows)  # with an empty row group
    (tmp_path / "j.parquet").write_bytes(parquet_bytes([]))  # nothing to read is no damage
    (tmp_path / "folder.txt").mkdir()
    kinds = [f"*{kind}" for kind in FILE_KINDS]
    report, documents = write_corpus(tmp_path, files("a.txt", *kinds, "a.*t*.txt"))
    assert [(each.source, each.text) for each in documents] == [
        ("a.txt", "One"),
        ("b.txt", "Two\r\nlines é\0\n"),
        ("c.jsonl:1", "in é json"),
        ("c.jsonl:4", "end"),
        ("g.json:1", "object"),
        ("g.json:2", "string é"),
        ("h.json:1", "one per line"),
        ("h.json:2", "as of some exports"),
        ("d.csv:3", 'two\r\nlines, "quoted"'),
        ("d.csv:5", "plain"),
        ("e.csv:2", "a, b"),
        ("f.csv:2", "with tab"),
        ("i.parquet:1", "row one"),
    ]
    assert report["left_out"] == {"empty": 1, "short": 0, "long": 0, "duplicate": 1}
    assert [each["documents"] for each in report["sources"]] == [1, 1, 0, 2, 4, 4, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\t\n", r"no document of the corpus files was kept \(left out: 1 empty\)"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"line 2: found columns \['body'\].*text_column"),
        ("a.jsonl", b"\n" + LONG, r"a\.jsonl, line 2 is longer than 1 MB .*max_row_megabytes"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv has columns \['id', 'body'\], expected one column 'text'"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", r"a\.csv, line 3 is not valid CSV \(the row and the header"),
        ("a.csv", b'id,text\n1,"' + b"a b\n" * 260_000, r"a\.csv, line 250,\d{3} is .*\(field larger"),
        ("a.csv", b'id,text\n1,"a\n', r"a\.csv, line 2 is not valid CSV"),
        ("a.json", b'["a"', r"a\.json is not valid JSON"),
        ("a.json", b'["' + LONG, r"a\.json, a JSON array, is longer than 1 MB"),
        ("a.parquet", parquet_bytes(["a"], names=("text", "text")), r"has columns \['text', 'text'\]"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is damaged, or was cut short"),
        ("a.parquet", parquet_bytes(["x"] * 40 + [LONG.decode()]), r"a\.parquet, row 41 is longer than"),
        ("a.parquet", parquet_bytes([1]), r"a\.parquet, row 1: found int, expected text"),
        ("a.parquet", parquet_bytes(INVALID_UTF8), r"a\.parquet is damaged.* can't decode byte 0xff"),
    ],
)
def test_bad_input_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    limits = {"max_document_megabytes": 1, "max_row_megabytes": 1}
    with pytest.raises(BadData, match=message):
        write_corpus(tmp_path, download_params(corpus="files", files={"patterns": [name]}, **limits))
    assert not (tmp_path / "documents").exists()


# --- which files there are


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingInput, match=r"no file matches .*\*\.txt, sub/\*\.jsonl"):
        write_corpus(tmp_path, files("*.txt", "sub/*.jsonl"))
    (tmp_path / "a.txt").write_text("here")
    with pytest.raises(MissingInput, match=r"b\.txt, named in download\.files\.patterns, is missing"):
        write_corpus(tmp_path, files("*.txt", "b.txt"))


def test_the_default_reads_every_kind_in_any_case_and_names_the_others(tmp_path):
    kinds = [f"{kind}{end}" for kind in FILE_KINDS for end in ("", ".gz", ".zst")]
    names = [f"corpus/a{kind}" for kind in kinds] + [f"corpus/sub/b{kind.upper()}" for kind in kinds]
    names.append("corpus/sub/README.md")
    for text in names:
        plain = {
            ".jsonl": json.dumps({"text": text}).encode(),
            ".json": json.dumps([text]).encode(),
            ".csv": f"text\n{text}\n".encode(),
            ".parquet": parquet_bytes([text]),
        }.get(text_files.file_kind(text), text.encode())
        compress = COMPRESS.get(text.rsplit(".")[-1].lower(), bytes)
        write_bytes(tmp_path / text, compress(plain))
    for name in ("README.md", "a.pdf", "b.PDF", "c.docx", "d", "big.dvc", ".gitignore"):
        (tmp_path / "corpus" / name).write_text("not text to train on")
    messages = []
    _, documents = write_corpus(tmp_path, download_params(corpus="files"), log=messages.append)
    assert sorted(each.text for each in documents) == sorted(names)
    shown = r"not read: 4 of .* corpus/ \(corpus/a.pdf, corpus/b.PDF, corpus/c.docx, \.\.\.\)"
    assert re.match(rf"{shown}.* \.txt \.md \.jsonl \.json \.csv \.parquet \(also with", messages[0])


def test_text_that_dvc_ignores_is_not_read_and_named(tmp_path):
    """DVC would not notice a change in it."""
    shutil.copyfile(ROOT / ".dvcignore", tmp_path / ".dvcignore")
    folders = ("x.egg-info", "__pycache__", "mlartifacts", "old~", ".venv", "own")
    hidden = [*(f"corpus/{name}/a.txt" for name in folders), "corpus/sub/b.txt"]
    for name in ["corpus/a.txt", "corpus/sub/a.txt", "corpus/.b/a.txt", *hidden]:
        write_bytes(tmp_path / name, name.encode())
    write_bytes(tmp_path / "corpus/sub/.dvcignore", b"b.txt")
    with open(tmp_path / ".dvcignore", "a") as file:
        file.write("corpus/own/\n")
    messages = []
    patterns = ["corpus/**", "corpus/.*/*.txt"]
    _, documents = write_corpus(tmp_path, files(*patterns), log=messages.append)
    assert [each.text for each in documents] == ["corpus/a.txt", "corpus/sub/a.txt", "corpus/.b/a.txt"]
    shown = ", ".join(sorted(hidden)[:3])
    assert messages[0].startswith(f"not read: 7 of the files in corpus/ ({shown}, ...). DVC ignores them")
    for pattern in ("corpus/own/**", "corpus/own/a.txt"):
        with pytest.raises(MissingInput, match=r"\(corpus/own/a\.txt\)\. DVC ignores .*\.dvcignore"):
            write_corpus(tmp_path, files(pattern))


def test_the_log_says_how_many_files_were_cut_and_where(tmp_path):
    def logged(**changes):
        messages = []
        write_corpus(tmp_path, files("*.txt", "*.jsonl", **changes), log=messages.append)
        return messages

    speeches = [f"Speech {n} of the play.\n" for n in range(7222)]
    (tmp_path / "rows.jsonl").write_text('"row one"\n"row two"\n')
    (tmp_path / "input.txt").write_text("\n".join([*speeches, speeches[0]]))
    every = "7,224 documents; left out: 1 duplicate"
    assert logged(split="blank-lines") == ["input.txt: 1 file -> 7,222 documents by blank lines", every]
    assert logged(split="none") == ["3 documents; left out: none"]
    (tmp_path / "short.txt").write_text("Not cut.")
    cut = r"input\.txt: 1 file -> 18\d documents by blank lines, of at least 1,000 characters"
    assert re.fullmatch(cut, logged(split_over_characters=100)[0])
    (tmp_path / "other.txt").write_text("Another\n\nplay.")
    assert logged(split="blank-lines")[0] == "3 files -> 7,225 documents by blank lines"


def test_a_stopped_run_over_files_resumes_inside_a_file(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.jsonl").write_text("".join(f'"file {n} row {k}"\n' for k in range(3)))
    open_corpus = partial(text_files.file_corpus, files("*.jsonl"), tmp_path, silent, print, lambda _: False)
    corpus = open_corpus()
    texts = list(corpus.read(None))
    assert len(texts) == 12
    for number, text in enumerate(texts, 1):
        assert list(corpus.read(text.position)) == texts[number:]
    changed = (tmp_path / "3.jsonl").stat().st_mtime_ns + 1
    os.utime(tmp_path / "3.jsonl", ns=(changed, changed))
    assert open_corpus().identity != corpus.identity


# --- compressed files


def test_a_compressed_file_is_its_content(tmp_path):
    rows = "".join(json.dumps({"text": f"row {n} of many"}) + "\n" for n in range(5000)).encode()
    for name, content in {"t.txt": b"words", "j.jsonl": rows, "p.parquet": parquet_bytes(["a"])}.items():
        (tmp_path / name).write_bytes(content)
        _, plain = write_corpus(tmp_path, files(name))
        for suffix, compress in COMPRESS.items():
            # Two members or frames, as `cat a.gz b.gz` makes them.
            halves = content[: len(content) // 2], content[len(content) // 2 :]
            (tmp_path / f"{name}.{suffix}").write_bytes(b"".join(map(compress, halves)))
            _, documents = write_corpus(tmp_path, files(f"{name}.{suffix}"))
            assert [each.text for each in documents] == [each.text for each in plain]
            assert documents[-1].source == plain[-1].source.replace(name, f"{name}.{suffix}")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_compressed_file_that_is_damaged_or_too_large_is_refused_by_name(
    tmp_path, monkeypatch, name, suffix
):
    words = Random(1).randbytes(700_000).hex()  # 1.4 MB of text that hardly compresses
    content = {"a.txt": words.encode(), "a.jsonl": json.dumps({"text": words}).encode() + b"\n"}
    content["a.parquet"] = parquet_bytes([words], compression="none")
    compressed = COMPRESS[suffix](content[name])
    path = tmp_path / f"{name}.{suffix}"
    altered = bytearray(compressed)
    altered[len(compressed) // 2] ^= 255
    for damaged in (compressed[: len(compressed) // 2], bytes(altered), b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(BadData, match=rf"{name}\.{suffix} is damaged, or was cut short"):
            write_corpus(tmp_path, files(path.name))
    path.write_bytes(compressed)
    assert write_corpus(tmp_path, files(path.name, split="none"))[0]["documents"] == 1
    with pytest.raises(BadData, match=r"holds more than 1 MB decompressed .*max_decompressed_megabytes"):
        write_corpus(tmp_path, files(path.name, max_decompressed_megabytes=1))
    # A bomb: 60 MB of the same byte are refused at the first 16 MB, whatever the other limits are.
    path.write_bytes(COMPRESS[suffix](b"x" * 60_000_000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chunks = []
    monkeypatch.setattr("shutil.disk_usage", lambda _: chunks.append(1) or SimpleNamespace(free=2**40))
    with pytest.raises(BadData, match=r"holds more than 16 MB decompressed .*max_decompression_ratio"):
        write_corpus(tmp_path, files(path.name))
    assert len(chunks) * text_files._CHUNK_BYTES <= 2**24


@pytest.mark.parametrize("name", ["a b.txt.zst", "a.jsonl.zst", "a.parquet.zst"])
def test_a_zstd_window_that_is_too_large_is_refused_with_the_command_that_converts_the_file(tmp_path, name):
    content = {".jsonl": b'{"text": "words"}', ".parquet": parquet_bytes(["words"])}
    plain = content.get(text_files.file_kind(name), b"words")
    for window_log in (27, 28):
        wide = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
        stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        (tmp_path / name).write_bytes(stream.compress(plain) + stream.flush())
        if window_log == 27:
            assert write_corpus(tmp_path, files(name))[0]["documents"] == 1
    path = shlex.quote(f"{tmp_path / name}")
    new = shlex.quote(f"{tmp_path / name}.new")
    command = f"`zstd -dc --long=31 {path} | zstd -o {new} && mv {new} {path}`"
    message = rf"{name} was compressed with .* \(such as `zstd --long=28`\).*: {re.escape(command)}"
    with pytest.raises(BadData, match=message):
        write_corpus(tmp_path, files(name))


def test_decompressing_leaves_space_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet_bytes(["a text"])))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(DiskFull, match=r"no space on the disk .*2,000 MB must stay free .*min_free_disk"):
        write_corpus(tmp_path, files("a.parquet.gz"))
