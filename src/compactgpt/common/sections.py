"""Read YAML files as typed objects, and check every key and value."""

import copy
import difflib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compactgpt.common.errors import BadConfig, MissingInput, printable

# A name is part of paths and of DVC stages. DVC would read the name `a.b` as the key `b` of `a`.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
NAME_RULE = "a name has letters, digits, '_' and '-' only, at most 64, and begins with a letter or digit"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_MARKER = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)


class Section(BaseModel):
    """One section of a YAML file: an immutable object that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def _mistakes(self) -> Iterator[str]:
        """Yield a message for each mistake that involves several keys. Subclasses override this method."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if found := list(self._mistakes()):
            raise ValueError("; ".join(found))
        return self


SectionType = TypeVar("SectionType", bound=Section)


def load_section(path: Path, section: type[SectionType]) -> SectionType:
    """Return a YAML file as an object of the class `section`; raises BadConfig with all mistakes."""
    return check_section(read_yaml(path), section, str(path))


# ruamel.yaml raises its own and built-in exceptions, such as ValueError for an invalid date.
YAML_ERRORS = (YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; raises MissingInput, or BadConfig if it is not valid YAML."""
    try:
        content = path.read_bytes()
        return copy.deepcopy(parse_yaml(content))
    except FileNotFoundError as error:
        raise MissingInput(
            f"{path} is missing: run from the repository folder, or give the path of the file"
        ) from error
    except YAML_ERRORS as error:
        if conflict := find_conflict(path.name, content):
            raise BadConfig(conflict) from error
        reason = " ".join(str(error).split()).replace('in "<byte string>",', "in")
        raise BadConfig(f"{path} is not valid YAML: {reason}") from error


@functools.lru_cache(maxsize=64)
def parse_yaml(content: bytes | str) -> Any:
    """Return the content of YAML 1.2. Callers must not change the result, because it is cached."""
    return YAML(typ="safe", pure=True).load(content)  # the reader that DVC uses


def find_conflict(name: str, content: bytes) -> str:
    """Return an error message if a file has git's conflict markers; without markers, an empty string."""
    if not _MARKER.search(content):  # one marker is enough: the user may have removed the others
        return ""
    found = f"{name} has conflict markers of an unresolved merge"
    if name != "dvc.lock":
        return f"{found}: delete the markers and the lines that you do not want, then run `git add {name}`"
    return (
        f"{found}: keep one side (`git checkout --ours dvc.lock`, or `--theirs`), then run `dvc repro` and "
        "`git add dvc.lock`"
    )


def check_section(tree: Any, section: type[SectionType], source: str) -> SectionType:
    """Return parsed YAML as an object of the class `section`.

    Raises BadConfig with all mistakes in one message, which begins with `source`, the name of the file.
    """
    try:
        # Pass JSON text: in strict mode, pydantic converts a list to a tuple only if the input is JSON text.
        return section.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [f"  {_explain(detail, tree, section)}" for detail in error.errors()]
        raise BadConfig(f"{source} is not valid:\n" + "\n".join(lines)) from error
    except (TypeError, ValueError, RecursionError) as error:  # raised by json.dumps
        raise BadConfig(f"{source}: {error}. Keys must be text; no value may hold its own alias") from error


def _explain(detail: Any, tree: Any, section: type[Section]) -> str:
    """Return a line about a mistake: the path of the key, the value found, and what is allowed."""
    path, node = [], json.loads(json.dumps(tree, default=str))
    for part in detail["loc"]:
        try:
            node = node[part]
        except (LookupError, TypeError):
            # The file does not contain `part`. If `part` is the missing key, keep it. Otherwise, skip it:
            # pydantic added it to the path, such as the kind of a baseline (`unigram`).
            if detail["type"] != "missing" or part != detail["loc"][-1]:
                continue
        path.append(str(part))
    shown = printable(".".join(path)) or "the file"
    if detail["type"] == "missing":
        return f"{shown}: missing key"
    if detail["type"] == "extra_forbidden":
        known = _keys_at(section, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"
        return f"{shown}: unknown key; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail.get("ctx", {}).get("pattern") == NAME_PATTERN:
        message = NAME_RULE
    if isinstance(detail["input"], dict | list):
        return f"{shown}: {message}" if path else message
    return f"{shown}: found {json.dumps(detail['input'])}; {message[0].lower()}{message[1:]}"


def _keys_at(section: type[Section], path: list[str]) -> list[str]:
    sections = [section]
    for part in path:
        fields = [each.model_fields[part].annotation for each in sections if part in each.model_fields]
        # A list index, or a name that the user chose, is not a field. Then `sections` stays the same.
        if fields:
            sections = [found for field in fields for found in _sections_in(field)]
    return sorted({key for each in sections for key in each.model_fields})


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections inside a type such as `dict[Name, HubSet] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]
