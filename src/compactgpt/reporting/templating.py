"""Jinja2 environments for HTML and Markdown. They escape all values, but not the messages of templates/."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compactgpt.common.errors import printable
from compactgpt.common.escaping import markdown_block, markdown_code, markdown_text
from compactgpt.reporting.messages import TEMPLATES, Language, load_messages

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MARKS = {"**": "strong", "*": "em", "`": "code"}  # Markdown mark in a message -> HTML element


@lru_cache
def html_environment() -> "Environment":
    """Return the environment of the HTML templates."""
    from markupsafe import escape

    environment = _environment(lambda text: escape(printable(text, keep="\n\t")))
    environment.filters["marked"] = _marks_to_html
    return environment


@lru_cache
def markdown_environment() -> "Environment":
    """Return the environment of the Markdown templates. It escapes Markdown and HTML in values."""
    from markupsafe import Markup

    environment = _environment(lambda text: Markup(markdown_text(text)))  # noqa: S704 (escaped right there)
    environment.filters |= {
        "marked": Markup,  # a message is Markdown already
        "code": lambda text: Markup(markdown_code(text)),  # noqa: S704
        "block": lambda text: Markup(markdown_block(text)),  # noqa: S704
    }
    return environment


def _environment(escape: Callable[[str], "Markup"]) -> "Environment":
    """Create a Jinja2 environment that escapes values with `escape`.

    Jinja2's autoescaping knows only HTML. So `finalize` escapes each value before autoescaping and returns it
    as `Markup`. Jinja2 does not escape `Markup` again, such as a macro's output or a message.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Markup:
        return value if isinstance(value, Markup) else escape(str(value))

    def message(language: Language, key: str, **values: Any) -> Markup:
        """Return the message `key` as markup, with escaped values in its placeholders."""
        template = str(environment.filters["marked"](load_messages(language)["text"][key]))
        escaped = {name: str(finalize(value)) for name, value in values.items()}
        return Markup(template.format(**escaped))  # noqa: S704 (the values are escaped above)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["message"] = message
    return environment


def _marks_to_html(text: str) -> "Markup":
    """Convert a message to HTML: escape it, then replace each pair of marks by an HTML element."""
    from markupsafe import Markup, escape

    html = str(escape(text))
    for mark, tag in MARKS.items():
        parts = html.split(mark)
        for inside in range(1, len(parts) - 1, 2):  # every second part is between two marks
            parts[inside] = f"<{tag}>{parts[inside]}</{tag}>"
        html = "".join(parts)
    return Markup(html)  # noqa: S704 (escaped above)
