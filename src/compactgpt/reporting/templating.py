"""Jinja2 environments for HTML and for Markdown. Every value is escaped; only messages of ours are markup."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compactgpt.common.errors import printable
from compactgpt.common.escaping import markdown_block, markdown_code, markdown_text
from compactgpt.reporting.messages import TEMPLATES, Language, messages

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_MARKS = (("**", "strong"), ("*", "em"), ("`", "code"))


@lru_cache
def html_environment() -> "Environment":
    """Return the environment of the HTML templates: text is escaped, invisible characters are shown."""
    from markupsafe import escape

    def escape_html(text: str) -> "Markup":
        return escape(printable(text, keep="\n\t"))

    environment = _environment(escape_html)
    environment.filters |= {"marked": _html_marks}
    return environment


@lru_cache
def markdown_environment() -> "Environment":
    """Return the environment of the Markdown templates: text is escaped for Markdown, HTML included."""
    from markupsafe import Markup

    environment = _environment(lambda text: Markup(markdown_text(text)))  # noqa: S704 (escaped right there)
    environment.filters |= {
        "marked": Markup,  # a message of ours is Markdown already
        "code": lambda text: Markup(markdown_code(text)),  # noqa: S704
        "block": lambda text: Markup(markdown_block(text)),  # noqa: S704
    }
    return environment


def _environment(escape: Callable[[str], "Markup"]) -> "Environment":
    """Make an environment.

    Autoescaping alone would escape Markdown as HTML, so `finalize` gets each value first and marks what it
    escaped; what is marked already (a macro's output, a message) passes.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Markup:
        return value if isinstance(value, Markup) else escape(str(value))

    def message(language: Language, key: str, **values: Any) -> Markup:
        """One message of a language, as markup, with its values escaped."""
        template = environment.filters["marked"](messages(language)["text"][key])
        escaped = {name: str(finalize(value)) for name, value in values.items()}
        return Markup(str(template).format(**escaped))  # noqa: S704 (the values are escaped above)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"message": message}
    return environment


def _html_marks(text: str) -> "Markup":
    """Escape a message, then set what stands between backticks, stars or pairs of stars."""
    from markupsafe import Markup, escape

    html = str(escape(text))
    for mark, tag in _MARKS:
        parts = html.split(mark)
        html = "".join(
            f"<{tag}>{part}</{tag}>" if number % 2 and number < len(parts) - 1 else part
            for number, part in enumerate(parts)
        )
    return Markup(html)  # noqa: S704 (escaped above)
