"""The words of the reports in English and French: templates/en.yaml and templates/fr.yaml."""

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
    """Return the words of a language, by section and key."""
    sections: Mapping[Section, Mapping[str, str]] = read_yaml(TEMPLATES / f"{language}.yaml")
    return sections


def translate_phrase(language: Language, sentence: str) -> str:
    """Return an English sentence of the record in a language; an unknown sentence is returned unchanged."""
    for key, english in load_messages("en")["phrases"].items():
        # A placeholder `{name}` of the English sentence matches any text.
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(english))
        if found := re.fullmatch(pattern, sentence):
            return load_messages(language)["phrases"][key].format(**found.groupdict())
    return sentence
