"""Messages of the reports in English and French, and Jinja2 environments for HTML and Markdown.

Templates escape values, but not the Markdown marks in messages.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compactgpt.common.errors import printable
from compactgpt.common.escaping import markdown_block, markdown_code, markdown_text
from compactgpt.common.sections import read_yaml

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")
TEMPLATES = Path(__file__).parent / "templates"
_HTML_TAGS = {r"\*\*": "strong", r"\*": "em", "`": "code"}  # pattern of a Markdown mark -> HTML element


@lru_cache
def load_messages(language: Language) -> Mapping[str, Mapping[str, str]]:
    """Return all messages of a language: section -> key -> message."""
    sections: Mapping[str, Mapping[str, str]] = read_yaml(TEMPLATES / f"{language}.yaml")
    return sections


def translate(language: Language, section: str, text: str) -> str:
    """Return the translation of `text`, an English text of reports/evidence.json.

    Searches in `section` of templates/<language>.yaml. If no translation is there, returns `text`.
    """
    for english, translation in load_messages(language).get(section, {}).items():
        # A placeholder `{name}` in the English text matches any text.
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(english))
        if found := re.fullmatch(pattern, text):
            return translation.format(**found.groupdict())
    return text


@lru_cache
def html_environment() -> "Environment":
    """Return the environment of the HTML templates, which escapes HTML in values."""
    from markupsafe import escape

    environment = _environment(lambda text: escape(printable(text, keep="\n\t")))
    environment.filters["marked"] = _marks_to_html
    return environment


@lru_cache
def markdown_environment() -> "Environment":
    """Return the environment of the Markdown templates, which escapes Markdown and HTML in values."""
    from markupsafe import Markup

    environment = _environment(lambda text: Markup(markdown_text(text)))  # noqa: S704 (escaped right there)
    environment.filters |= {
        "marked": Markup,  # messages are Markdown already, so do not escape them
        "code": lambda text: Markup(markdown_code(text)),  # noqa: S704
        "block": lambda text: Markup(markdown_block(text)),  # noqa: S704
    }
    return environment


def _environment(escape: Callable[[str], "Markup"]) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
    from markupsafe import Markup

    def finalize(value: Any) -> Markup:
        # Jinja2 itself can only escape HTML, so call `escape` here. `Markup` values are already escaped.
        return value if isinstance(value, Markup) else escape(str(value))

    @pass_context
    def message(context: Mapping[str, Any], key: str, **values: Any) -> Markup:
        """Return the message `view.words[key]` as markup, with escaped values in place of placeholders."""
        view = context["view"]
        template = str(environment.filters["marked"](view.words[key]))
        escaped = {name: finalize(value) for name, value in {**view.facts, **values}.items()}
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
    """Escape a message as HTML and replace its Markdown marks by HTML elements."""
    from markupsafe import Markup, escape

    html = str(escape(text))
    for mark, tag in _HTML_TAGS.items():
        html = re.sub(f"(?s){mark}(.+?){mark}", rf"<{tag}>\1</{tag}>", html)
    return Markup(html)  # noqa: S704 (escaped above)
