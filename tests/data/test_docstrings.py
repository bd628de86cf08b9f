"""The embedded corpus holds the docstrings of the pinned distributions, or a message says what is wrong."""

import inspect
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import verified_manifest, write_text
from compactgpt.data import docstrings
from tests.support.corpora import download_params, write_corpus

SOURCE = '''"""Module text.

  As wide as the margin.
    Indented once.
"""
raise RuntimeError("a corpus is never imported")

if sys.platform == "nowhere":
    def chosen():
        """Chosen text."""
else:
    try:
        class Kind:
            """Kind text."""
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
DOCUMENT = [
    "alpha.core\nModule text.\n\nAs wide as the margin.\n  Indented once.",
    "alpha.core.chosen\nChosen text.",
    "alpha.core.Kind\nKind text.",
    "alpha.core.Kind.method\nMethod text.",
    "alpha.core.Kind.method.inner\nInner text.",
    "alpha.core.late\nLate \\d text.",
]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs the distribution `alpha` as pip does, and returns its folder."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(files, version="1.0"):
        info = site / f"alpha-{version}.dist-info"
        metadata = f"Metadata-Version: 2.4\nName: alpha\nVersion: {version}\nLicense-Expression: MIT\n"
        write_text(info / "METADATA", metadata)
        write_text(info / "RECORD", "".join(f"{path},,\n" for path in files))
        for path, content in files.items():
            write_text(site / path, content)
        return site

    return install


def alpha(version="1.0", **changes):
    part = {"distributions": {"alpha": version}, "min_characters": 1, "max_characters": 100_000}
    return download_params(corpus="docstrings", docstrings=part | changes)


def test_a_document_is_a_modules_docstrings_under_their_names(tmp_path, install):
    install({"alpha/core.py": SOURCE, "alpha/empty.py": "x = 1"})
    report, (document,) = write_corpus(tmp_path, alpha())
    assert (document.text, document.source) == ("\n\n".join(DOCUMENT), "alpha/alpha.core")
    expected = {"name": "alpha", "version": "1.0", "licence": "MIT", "documents": 1}
    assert report["sources"][0].items() >= expected.items()
    assert report["left_out"]["empty"] == 1


def test_modules_come_by_path_and_excluded_ones_are_left_out(tmp_path, install):
    wanted = ["alpha/__init__.py", "alpha/b.py", "alpha/sub/a.py", "alpha.py", "alpha/testing_tools.py"]
    unwanted = ["alpha/tests/a.py", "alpha/version.py", "alpha/data.txt", "../bin/tool.py"]
    install({path: f'"""Text of {path}."""' for path in reversed(wanted + unwanted)})
    sources = ["alpha", "alpha.b", "alpha.sub.a", "alpha.testing_tools", "alpha"]
    for num_workers in (1, 2):  # the number of workers does not change the corpus
        _, documents = write_corpus(tmp_path, alpha(exclude=["tests", "version"]), num_workers)
        assert [each.source for each in documents] == [f"alpha/{name}" for name in sources]


@given(st.text(" \tab\n"))
def test_a_docstring_is_cleaned_as_by_python_except_for_blanks_at_line_ends(raw):
    cleaned = docstrings.clean_docstring(raw).splitlines()
    assert cleaned == [line.rstrip() for line in inspect.cleandoc(raw).strip().splitlines()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"""caf\xe9"""', r"core\.py is not Python source in UTF-8 \(.*byte 0xe9"),
        (b'"""A lone \\ud800."""', r"alpha/alpha\.core: character 19 of the text is a lone surrogate"),
    ],
)
def test_a_module_that_is_not_text_is_named_and_the_old_corpus_stays(tmp_path, install, content, message):
    site = install({"alpha/core.py": SOURCE})
    write_corpus(tmp_path, alpha())
    before = verified_manifest(tmp_path / "documents")
    (site / "alpha/core.py").write_bytes(content)
    with pytest.raises(BadData, match=message):
        write_corpus(tmp_path, alpha())
    assert verified_manifest(tmp_path / "documents") == before


def test_a_distribution_that_is_not_installed_as_pinned_is_named(tmp_path, install):
    with pytest.raises(MissingInput, match=r"alpha 1\.0 is .* not installed: run `make setup`"):
        write_corpus(tmp_path, alpha())
    site = install({"alpha/core.py": SOURCE}, "1.1+local")
    with pytest.raises(
        MissingInput, match=r"alpha 1\.1\+local is installed, .* names 1\.0: run `make setup`"
    ):
        write_corpus(tmp_path, alpha())
    write_corpus(tmp_path, alpha("1.1"))
    (site / "alpha/core.py").unlink()
    with pytest.raises(MissingInput, match=r"core\.py is missing.*make setup"):
        write_corpus(tmp_path, alpha("1.1"))


@pytest.mark.parametrize(
    ("fields", "short"),
    [
        ({"License-Expression": "BSD-3-Clause AND MIT", "License": "other"}, "BSD-3-Clause AND MIT"),
        ({"License": "BSD"}, "BSD"),
        ({"License": "Long\ntext", "Classifier": "License :: OSI Approved :: BSD License"}, "BSD License"),
        ({"License": "The text in one line " * 9, "Classifier": "Topic :: Text"}, "unknown"),
    ],
)
def test_a_licence_is_named_in_a_few_words(fields, short):
    metadata = Message()
    for name, value in fields.items():
        metadata.add_header(name, value)
    assert docstrings.short_licence(metadata) == short
