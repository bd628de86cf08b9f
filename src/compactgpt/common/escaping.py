"""Escape text from a corpus, a file name or a model, so that Markdown shows it and does not interpret it."""

import re

from compactgpt.common.errors import printable

# Matches the characters that are markup in Markdown (CommonMark with GitHub's extensions). An underscore
# inside a word is no markup, and `-`, `+` and `#` are markup only at the start of a line.
_MARKUP = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|(?<=:)/(?=/)|(?<=www)\."  # links such as https://x.org and www.x.org
    r"|^[-+#](?=[\s#])|(?<=^\d)[.)](?=\s)|(?<=^\d\d)[.)](?=\s)",  # lists and headings
    re.IGNORECASE,
)
_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "@": "@\u200b",
}  # GitHub takes `@name` for a mention of a user; an invisible space after `@` prevents this


def markdown_text(text: str) -> str:
    """Return the text on one line, escaped so that Markdown shows it unchanged, also inside a table."""
    marked = _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))
    return re.sub("[&<>@]", lambda found: _ENTITIES[found[0]], marked)


def markdown_code(text: str) -> str:
    """Return the text as a code span for a cell of a Markdown table."""
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{printable(text)}{pad}{fence}".replace("|", "\\|")


def markdown_block(text: str) -> str:
    """Return the text as a code block, with a fence that the text does not contain."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([f"{fence}text", printable(text, keep="\n\t"), fence])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
