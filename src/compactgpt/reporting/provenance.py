"""Trace a value of the record to its stage's code, its input files and the commit of its dvc.lock entry.

Identical runs must write identical reports, so reports contain no commit and no run id. They contain the hash
of the stage's code. `compactgpt trace` finds the input files and the commit.
"""

import ast
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, MissingInput, UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import sha256_file
from compactgpt.tracking.dvc_files import Folder, deps, outs, read_chain, stages_before

RECORD = Path("reports/evidence.json")
# Modules that can't change a stage's output: they write messages, progress and MLflow logs.
# config.py only reads params.yaml, and DVC tracks the values of params.yaml as params.
UNTRACKED = {
    "common/console",
    "common/errors",
    "common/sections",
    "config",
    "tracking/journal",
    "tracking/training_callbacks",
}


def code_hashes(root: Path) -> dict[str, str]:
    """Return a hash of each stage's code: the stage script and the modules that it imports.

    The hash is the SHA-256 of the lines `<SHA-256 of the file>  <path>`, sorted by path.
    """
    hashes = {}
    for script in sorted((root / "stages").glob("[!_]*.py")):
        modules = (f"src/compactgpt/{name}.py" for name in stage_modules(root, script))
        files = sorted([f"stages/{script.name}", *modules])
        lines = [f"{sha256_file(root / path)}  {path}\n" for path in files]
        hashes[script.stem] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashes


def stage_modules(root: Path, script: Path) -> set[str]:
    """Return the modules that a stage script imports, directly or indirectly, such as `common/escaping`."""
    seen: set[str] = set()
    todo = imported_modules(root, script) - UNTRACKED
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= imported_modules(root, root / f"src/compactgpt/{name}.py") - UNTRACKED - seen
    return seen


def imported_modules(root: Path, path: Path) -> set[str]:
    """Return the modules of compactgpt that a file imports, at the top of the file or inside functions."""
    found = set()
    for name in _imported_names(path.read_bytes()):
        # In `from compactgpt.a import b`, b is a module of the package a, or a name in the module a.
        candidates = (name, name.rpartition("/")[0])
        modules = [one for one in candidates if one and (root / f"src/compactgpt/{one}.py").is_file()]
        found.update(modules[:1])
    return found


@lru_cache(maxsize=256)
def _imported_names(source: bytes) -> frozenset[str]:
    """Return the names that Python source imports from compactgpt: `a/b` for `from compactgpt.a import b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("compactgpt.") for name in found if name.startswith("compactgpt.")}
    return frozenset(name.replace(".", "/") for name in ours)


def find_value(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the value with the id `name` from the record. Raises MissingInput with similar ids."""
    values: dict[str, dict[str, Any]] = {item["id"]: item for item in record["evidence"]}
    if name not in values:
        similar = [known for known in values if name in known or known.rpartition(".")[0] == name][:8]
        hint = f"similar ids: {', '.join(similar)}" if similar else "reports/comparison.csv lists all values"
        raise MissingInput(f"no value has the id {name}; {hint}")
    return values[name]


def trace(root: Path, record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """Return the origin of a value, as (label, text) pairs: report, stage, hashes, files, commit.

    Raises MissingInput if the record has no such value, or BadData if dvc.lock has no entry for its stage.
    """
    value = find_value(record, name)
    stage = value["stage"]
    entry = read_chain(Folder(root)).entries.get(stage)
    if entry is None:
        raise BadData(f"dvc.lock or dvc.yaml has no stage {stage}: run `dvc repro`")
    lines = [
        ("value", f"{value['value']!r} {value['unit']}, {value['known']}"),
        ("source", value["source"]),
        ("report", value["report"]),
        ("stage", f"{stage}  ({entry['cmd']})"),
        ("code", f"SHA-256 {value['code_sha256']}"),
    ]
    hashes = [(what, value[f"{what}_sha256"]) for what in ("data", "weights")]
    lines += [(what, f"SHA-256 {sha256}") for what, sha256 in hashes if sha256]
    lines += [("read", f"{path}  md5 {md5}") for path, md5 in deps(entry).items()]
    lines += [("wrote", f"{path}  md5 {md5}") for path, md5 in outs(entry).items()]
    lines.append(("needs", " -> ".join(stages_before(root, stage)) or "params.yaml only"))
    lines.append(("commit", find_lock_commit(root, stage)))
    return lines


def find_lock_commit(root: Path, stage: str) -> str:
    """Return the commit that last changed a stage's entry in dvc.lock: its hash, date and subject."""
    block = _stage_lines((root / "dvc.lock").read_text(encoding="utf-8"), stage)
    try:
        if _stage_lines(git_text(root, "show", "HEAD:dvc.lock") + "\n", stage) != block:
            return "not committed yet"
        lines = f"/^  {stage}:$/,+{block.count(chr(10))}:dvc.lock"
        return git_text(root, "log", "-1", "--no-patch", "--format=%h %as %s", "-L", lines)
    except UserError:
        return "not under git"


def _stage_lines(lock: str, stage: str) -> str:
    found = re.search(rf"^  {re.escape(stage)}:\n(?:    .*\n)*", lock, re.MULTILINE)
    return found[0] if found else ""
