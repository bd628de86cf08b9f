"""The embedded corpus: docstrings of installed distributions, read from their source, never imported.

A document is one module: each of its docstrings in source order, under its qualified name. The text
depends on the distributions alone: not on the platform, not on the version of Python.
"""

import ast
import csv
import gc
import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from compactgpt.common.console import Progress, silent
from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.workers import ordered_map
from compactgpt.config import Docstrings
from compactgpt.data.sources import Origin, Piece

_SHORT_LICENCE = 40  # characters: a longer field holds the licence's whole text
_MEND = "delete .venv and run `make setup`"
_MODULES_PER_TASK = 16
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


@dataclass(frozen=True, slots=True)
class Module:
    """One source file of a distribution."""

    name: str  # dotted
    path: Path
    source: str  # distribution/name


@dataclass(frozen=True, slots=True)
class Distribution:
    """What its own metadata say of an installed distribution."""

    name: str
    version: str
    licence: str
    modules: tuple[Module, ...]


class DocstringReader:
    """The docstrings of pinned distributions, as a corpus: see compactgpt.corpus.Reader."""

    name = "docstrings"

    def __init__(self, params: Docstrings, num_workers: int, progress: Progress = silent) -> None:
        self._found = [
            find_distribution(name, version, params.exclude)
            for name, version in sorted(params.distributions.items())
        ]
        self._num_workers, self._progress = num_workers, progress
        self._done = 0
        self.identity = params.model_dump(mode="json")
        self.lengths = range(params.min_characters, params.max_characters + 1)
        self.parts = [Origin(each.name, each.version, each.licence) for each in self._found]

    def place(self) -> Any:
        """How many modules are done."""
        return self._done

    def read(self, place: Any) -> Iterator[Piece]:
        """Yield a document for each module behind a place."""
        owned = [(module, part) for part, each in enumerate(self._found) for module in each.modules]
        done = place or 0
        modules = [module for module, _ in owned[done:]]
        tasks = [
            modules[start : start + _MODULES_PER_TASK] for start in range(0, len(modules), _MODULES_PER_TASK)
        ]
        results = chain.from_iterable(ordered_map(read_modules, tasks, self._num_workers))
        for self._done, ((module, part), text) in enumerate(
            zip(owned[done:], results, strict=True), done + 1
        ):
            yield Piece(text, module.source, part)
            self._progress(self._done, len(owned))


def find_distribution(name: str, version: str, exclude: Sequence[str]) -> Distribution:
    """List the modules of an installed distribution, sorted by path.

    Args:
        name: of the distribution.
        version: the one that must be installed; a local part such as `+cpu` is not compared.
        exclude: names of folders and modules that are left out.

    Raises:
        MissingInput: it is not installed, in another version, or does not list its files.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingInput(
            f"{name} {version} is part of the corpus and is not installed: run `make setup`"
        ) from error
    if found.version.split("+")[0] != version:
        raise MissingInput(
            f"{name} {found.version} is installed where params.yaml (download.docstrings.distributions) "
            f"names {version}: run `make setup`, or change one of the two"
        )
    left_out = {*exclude, ".."}
    # Not `found.files`, which leaves out what is missing from Python 3.12 on.
    listed = csv.reader((found.read_text("RECORD") or "").splitlines())
    paths = sorted(
        file
        for file in (PurePosixPath(row[0]) for row in listed if row)
        if file.suffix == ".py" and not left_out.intersection([*file.parts[:-1], file.stem])
    )
    if not paths:
        raise MissingInput(f"{name} {version} is installed without a list of its modules: {_MEND}")
    modules = tuple(
        Module(module, Path(str(found.locate_file(path))), f"{name}/{module}")
        for path, module in ((path, _dotted(path)) for path in paths)
    )
    return Distribution(name, version, short_licence(found.metadata), modules)


def _dotted(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def short_licence(metadata: Any) -> str:
    """Name a licence in a few words: the SPDX expression, the short field, or the classifier.

    Args:
        metadata: core metadata (packaging.python.org, Core metadata specifications): License-Expression,
            License, Classifier.
    """
    expression = (metadata.get("License-Expression") or "").strip()
    named = (metadata.get("License") or "").strip()
    if expression:
        return str(expression)
    if named and len(named) <= _SHORT_LICENCE and "\n" not in named:
        return str(named)
    names = [
        classifier.rsplit(" :: ", 1)[-1]
        for classifier in metadata.get_all("Classifier") or []
        if classifier.startswith("License :: ")
    ]
    return ", ".join(names) or "unknown"


def read_modules(modules: Sequence[Module]) -> list[str]:
    """Return the document of each module; see `read_module`.

    Without the cyclic garbage collector, which costs a third of the time here: syntax trees are many
    objects and hold no cycles.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [read_module(module) for module in modules]
    finally:
        if collecting:
            gc.enable()


def read_module(module: Module) -> str:
    """Return the document of one module; empty where it has no docstring.

    Raises:
        MissingInput: the file is not there.
        BadData: it is not UTF-8, or no Python that this interpreter can read.
    """
    try:
        content = module.path.read_bytes()
        content.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(content)
    except FileNotFoundError as error:
        raise MissingInput(f"{module.path} is missing: {_MEND}") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{module.path} is not UTF-8 (byte {error.start:,}): {_MEND}") from error
    except (SyntaxError, ValueError) as error:
        raise BadData(f"{module.path} is no Python source ({error}): {_MEND}") from error
    return "\n\n".join(f"{name}\n{text}" for name, text in _docstrings(tree, module.name))


def _docstrings(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Walk statements only: expressions hold no docstrings and most of a tree's nodes."""
    raw = ast.get_docstring(node, clean=False)
    if raw is not None and (text := clean_docstring(raw)):
        yield name, text
    yield from _inside(node, name)


def _inside(node: Any, name: str) -> Iterator[tuple[str, str]]:
    for block in _BLOCKS:
        statements = getattr(node, block, ())
        for statement in statements:
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(statement, f"{name}.{statement.name}")
            else:
                yield from _inside(statement, name)


def clean_docstring(raw: str) -> str:
    """Strip the indentation that a docstring owes to its place (PEP 257), and blanks at line ends.

    Not inspect.cleandoc, whose result depends on the version of Python.
    """
    first, *rest = raw.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip()
