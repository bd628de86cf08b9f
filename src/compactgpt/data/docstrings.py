"""Build the corpus `docstrings` from the docstrings of installed distributions.

The source files are parsed and never imported. One module becomes one document.
"""

import ast
import csv
import gc
import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from compactgpt.common.console import Progress
from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.workers import ordered_map
from compactgpt.config import Docstrings
from compactgpt.data.documents import Corpus, Part, Text

# A licence's name has at most this many characters. A longer field `License` has the complete licence text.
_SHORT_LICENCE = 40
_REPAIR = "delete .venv and run `make setup`"
_MODULES_PER_TASK = 16
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Fields of `ast` nodes that contain statements. `handlers` and `cases` contain nodes with a `body` instead.
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


class Module(NamedTuple):
    """One source file of a distribution."""

    name: str  # for example `scipy.stats`
    path: Path


def docstring_corpus(params: Docstrings, num_workers: int, progress: Progress) -> Corpus:
    """Return the docstrings of the distributions in params.yaml as a corpus.

    Raises MissingInput if a distribution is missing or has another version.
    """
    parts: list[Part] = []
    modules: list[tuple[int, Module]] = []  # (index in `parts`, module)
    for name, version in sorted(params.distributions.items()):
        part, found = find_modules(name, version, params.exclude)
        modules += [(len(parts), module) for module in found]
        parts.append(part)

    def read(position: Any) -> Iterator[Text]:
        done = position or 0  # number of modules that a stopped `download` has read
        left = [module for _, module in modules[done:]]
        tasks = [left[start : start + _MODULES_PER_TASK] for start in range(0, len(left), _MODULES_PER_TASK)]
        texts = chain.from_iterable(ordered_map(read_modules, tasks, num_workers))
        for number, text in enumerate(texts, done + 1):
            part, module = modules[number - 1]
            yield Text(text, f"{parts[part].name}/{module.name}", part, number)
            progress(number, len(modules))

    lengths = range(params.min_characters, params.max_characters + 1)
    return Corpus("docstrings", params.model_dump(mode="json"), parts, read, lengths)


def find_modules(name: str, version: str, exclude: Sequence[str]) -> tuple[Part, list[Module]]:
    """Return an installed distribution as a corpus part, and its modules sorted by path.

    `exclude` names folders and modules to leave out. Raises MissingInput if this version is not installed.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingInput(
            f"{name} {version} is part of the corpus, but is not installed: run `make setup`"
        ) from error
    if found.version.split("+")[0] != version:  # a suffix such as `+cpu` is ignored
        raise MissingInput(
            f"{name} {found.version} is installed, but params.yaml (download.docstrings.distributions) "
            f"names {version}: run `make setup`, or correct the version in params.yaml"
        )
    # Read RECORD instead of `found.files`, which leaves out missing files since Python 3.12.
    record = csv.reader((found.read_text("RECORD") or "").splitlines())
    modules = []
    left_out = {*exclude, ".."}
    for file in sorted(PurePosixPath(row[0]) for row in record if row):
        if file.suffix == ".py" and left_out.isdisjoint([*file.parts[:-1], file.stem]):
            dotted = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            modules.append(Module(dotted, Path(str(found.locate_file(file)))))
    if not modules:
        raise MissingInput(f"{name} {version} is installed without a list of its modules: {_REPAIR}")
    return Part(name, version, short_licence(found.metadata)), modules


def short_licence(metadata: Any) -> str:
    """Return the name of a distribution's licence from its core metadata.

    Looks for the SPDX expression, a short field `License` and licence classifiers, in this order.
    """
    if expression := metadata.get("License-Expression"):
        return str(expression)
    licence = (metadata.get("License") or "").strip()
    if 0 < len(licence) <= _SHORT_LICENCE and "\n" not in licence:
        return str(licence)
    classifiers = metadata.get_all("Classifier") or []
    names = [each.rsplit(" :: ", 1)[-1] for each in classifiers if each.startswith("License :: ")]
    return ", ".join(names) or "unknown"


def read_modules(modules: Sequence[Module]) -> list[str]:
    """Return the docstrings of each module as one text, which may be empty."""
    # Syntax trees have no reference cycles, and the garbage collector would take a third of the time.
    gc.disable()
    try:
        return [_read_module(module) for module in modules]
    finally:
        gc.enable()


def _read_module(module: Module) -> str:
    try:
        content = module.path.read_bytes()
        content.decode("utf-8")  # refuse other encodings, which `ast.parse` accepts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example, invalid escape sequences
            tree = ast.parse(content)
    except FileNotFoundError as error:
        raise MissingInput(f"{module.path} is missing: {_REPAIR}") from error
    except (SyntaxError, ValueError) as error:
        raise BadData(f"{module.path} is not Python source in UTF-8 ({error}): {_REPAIR}") from error
    return "\n\n".join(f"{name}\n{text}" for name, text in _docstrings(tree, module.name))


def _docstrings(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a node and of the classes and functions inside it."""
    if isinstance(node, (ast.Module, *_DEFINITIONS)):
        text = clean_docstring(ast.get_docstring(node, clean=False) or "")
        if text:
            yield name, text
    # Visit only statements: expressions are most of the nodes and contain no docstrings.
    for block in _BLOCKS:
        for statement in getattr(node, block, ()):
            inner = f"{name}.{statement.name}" if isinstance(statement, _DEFINITIONS) else name
            yield from _docstrings(statement, inner)


def clean_docstring(raw: str) -> str:
    """Return a docstring without common indentation (PEP 257) and without trailing white space."""
    # Not `inspect.cleandoc`: its result depends on the version of Python.
    first, *rest = raw.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip()
