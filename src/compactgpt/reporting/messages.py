"""Load the messages of the reports in English and French from templates/en.yaml and templates/fr.yaml."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from compactgpt.common.sections import read_yaml

Language = Literal["en", "fr"]
Section = Literal["text", "verdicts", "known", "units", "phrases"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")
TEMPLATES = Path(__file__).parent / "templates"


@lru_cache
def load_messages(language: Language) -> Mapping[Section, Mapping[str, str]]:
    """Return all messages of a language, by section and key."""
    sections: Mapping[Section, Mapping[str, str]] = read_yaml(TEMPLATES / f"{language}.yaml")
    return sections


def translate_phrase(language: Language, sentence: str) -> str:
    """Translate an English sentence of the record; return a sentence without a translation unchanged."""
    for english, translation in load_messages(language).get("phrases", {}).items():
        # A placeholder `{name}` in the English phrase matches any text.
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(english))
        if found := re.fullmatch(pattern, sentence):
            return translation.format(**found.groupdict())
    return sentence
