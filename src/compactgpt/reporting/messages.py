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
def messages(language: Language) -> Mapping[Section, Mapping[str, str]]:
    """Read the words of a language, by section and key."""
    sections: Mapping[Section, Mapping[str, str]] = read_yaml(TEMPLATES / f"{language}.yaml")
    return sections


def translate(language: Language, section: Section, word: str) -> str:
    """Return a word of the record in a language; an unknown word stays as it is."""
    return messages(language)[section].get(word, word)


def translate_phrase(language: Language, sentence: str) -> str:
    """Return an English sentence of the record in a language; an unknown sentence stays as it is."""
    if language == "en":
        return sentence
    for key, pattern in _phrase_patterns():
        if found := pattern.fullmatch(sentence):
            return messages(language)["phrases"][key].format(**found.groupdict())
    return sentence


@lru_cache
def _phrase_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """The English sentences as patterns: a placeholder `{name}` matches any text."""
    patterns = []
    for key, english in messages("en")["phrases"].items():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(english))
        patterns.append((key, re.compile(pattern)))
    return patterns
