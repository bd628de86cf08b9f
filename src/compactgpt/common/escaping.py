"""Escape text so that Markdown shows it unchanged."""

import re

from compactgpt.common.errors import printable

# Markup of CommonMark and of GitHub's extensions.
_MARKUP = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # `_` is markup, except inside a word, as in `n_head`
    r"|(?<=:)/(?=/)|(?<=www)\."  # GitHub makes links of https://x.org and www.x.org
    r"|^[-+#](?=[\s#])|(?<=^\d)[.)](?=\s)|(?<=^\d\d)[.)](?=\s)",  # the start of a list or a heading
    re.IGNORECASE,
)
# An invisible space after `@` keeps GitHub from reading `@name` as a user.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@\u200b"}


def markdown_text(text: str) -> str:
    """Return the text as one escaped line of Markdown, which may be a cell of a table."""
    marked = _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))
    return re.sub("[&<>@]", lambda found: _ENTITIES[found[0]], marked)


def markdown_code(text: str) -> str:
    """Return the text as a code span of Markdown, for a cell of a table."""
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{printable(text)}{pad}{fence}".replace("|", "\\|")


def markdown_block(text: str) -> str:
    """Return the text as a Markdown code block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([f"{fence}text", printable(text, keep="\n\t"), fence])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
