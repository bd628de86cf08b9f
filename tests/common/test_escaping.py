"""Text from outside stays text in Markdown: whatever it holds, a reader sees it, and nothing else happens."""

import html
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from compactgpt.common.errors import printable
from compactgpt.common.escaping import markdown_block, markdown_code, markdown_text

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert('1')</script>",
    'a" onclick="b',
    "**bold** _em_ __strong__ ~~gone~~ `code`",
    "[link](https://example.org) ![image](x.png)",
    "https://example.org www.example.org a@example.org",
    "| a | b |",
    "# heading",
    "- item",
    "1. item",
    "&lt;b&gt; &#60;",
    "$x$ \\(y\\)",
    "a\nb",
]


def shown(markup: str) -> str:
    """What a reader of the rendered paragraph sees."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup)).replace("\u200b", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_and_its_tables_show_hostile_text_as_it_is(text):
    rendered = MARKDOWN.render(markdown_text(text)).strip()
    assert re.fullmatch(r"<p>[^<]*</p>", rendered), rendered
    assert shown(rendered) == printable(text)
    table = f"| a | b |\n| --- | --- |\n| {markdown_text(text)} | {markdown_code(text)} |\n"
    cells = re.findall(r"<td>(.*?)</td>", MARKDOWN.render(table))
    assert [shown(cell) for cell in cells] == [printable(text), printable(text)]
    assert set(re.findall(r"<(\w+)", "".join(cells))) <= {"code"}


@given(st.text(st.characters(blacklist_categories=["Zs", "Cn"]), min_size=1))
@example("```\n<script>")
@example("    ~~~")
def test_any_text_stays_one_paragraph_or_one_code_block(text):
    rendered = MARKDOWN.render(f"x {markdown_text(text)} x").strip()
    assert re.fullmatch(r"<p>[^<]*</p>", rendered), rendered
    assert shown(rendered) == f"x {printable(text)} x".replace("\u200b", "")
    rendered = MARKDOWN.render(markdown_block(text) + "\n\nafter")
    assert re.fullmatch(r'<pre><code class="language-text">[^<]*</code></pre>\n<p>after</p>\n', rendered)


def test_control_and_direction_characters_are_shown():
    text = "a\u202ecod.exe\x1b[31m\x00\u2066\ufeff\ud800 b\r\n"
    assert printable(text) == "a\\u202ecod.exe\\x1b[31m\\x00\\u2066\\ufeff\\ud800 b\\r\\n"
    assert printable("a\tb\nc", keep="\n\t") == "a\tb\nc"
    assert printable("naïve 日本語 עברית 👩") == "naïve 日本語 עברית 👩"
