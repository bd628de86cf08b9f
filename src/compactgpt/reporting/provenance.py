"""Which code made a value, what its stage read, and which commit last wrote that down.

Reports hold nothing that differs between identical runs, so no commit and no run id can stand in them. What
stands there is the hash of the stage's own code; the rest of the chain is found when somebody asks.
"""

import ast
import hashlib
import re
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.git import run_git
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import sha256_file
from compactgpt.tracking.dvc_files import entries_of

RECORD = Path("reports/evidence.json")
# Modules whose edit changes no output of a stage: they hold messages, progress and what MLflow logs.
# DVC tracks what config.py reads value by value, as params.
UNTRACKED = {
    "common/console",
    "common/errors",
    "common/sections",
    "config",
    "tracking/journal",
    "tracking/training_callbacks",
}


def code_hashes(root: Path) -> dict[str, str]:
    """Hash the code of each stage script: the files that dvc.yaml lists for the stage.

    (dvc.yaml itself can't be read for it: DVC takes it for no dependency.)

    Returns:
        By door, SHA-256 of lines `<SHA-256 of the file>  <path>` in the order of the paths.
    """
    hashes = {}
    for door in sorted((root / "stages").glob("*.py")):
        if door.stem.startswith("_"):
            continue
        files = [f"stages/{door.name}", *(f"src/compactgpt/{name}.py" for name in stage_modules(root, door))]
        lines = [f"{sha256_file(root / path)}  {path}\n" for path in sorted(files)]
        hashes[door.stem] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashes


def stage_modules(root: Path, door: Path) -> set[str]:
    """Modules that a stage script uses, directly or through other modules, such as `common/escaping`."""
    seen: set[str] = set()
    todo = imported_modules(root, door) - UNTRACKED
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= imported_modules(root, root / f"src/compactgpt/{name}.py") - UNTRACKED - seen
    return seen


def imported_modules(root: Path, path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside its functions."""
    found = set()
    for dotted in _imported(path.read_bytes()):
        # `from compactgpt.a import b`: b is a module of the folder a, or something in the module a
        for name in (dotted, dotted.rpartition("/")[0]):
            if name and (root / f"src/compactgpt/{name}.py").is_file():
                found.add(name)
                break
    return found


@lru_cache(maxsize=256)
def _imported(source: bytes) -> frozenset[str]:
    """What a file imports of the package, with slashes: `a/b` for `from compactgpt.a import b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        found |= {name.replace(".", "/") for name in names if name.startswith("compactgpt.")}
    return frozenset(name.removeprefix("compactgpt/") for name in found)


def find_value(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Look a value up in the record.

    Raises:
        MissingInput: it has none of that name; the message names those that are alike.
    """
    values: dict[str, dict[str, Any]] = {item["id"]: item for item in record["evidence"]}
    if name not in values:
        alike = [known for known in values if name in known or known.rpartition(".")[0] == name][:8]
        raise MissingInput(
            f"no value is called {name}"
            + (f"; there are {', '.join(alike)}" if alike else "; reports/comparison.csv lists all of them")
        )
    return values[name]


def stage_entry(lock: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What dvc.lock says of a stage.

    Raises:
        BadData: nothing.
    """
    entry: dict[str, Any] | None = lock.get("stages", {}).get(stage)
    if entry is None:
        raise BadData(f"dvc.lock has no stage {stage}: run `dvc repro` to make it")
    return entry


def upstream(lock: Mapping[str, Any], stage: str) -> list[str]:
    """The stages that a stage stands on, in the order in which they run."""
    makers = {out["path"]: name for name, entry in lock["stages"].items() for out in entry.get("outs", [])}
    found: list[str] = []

    def visit(name: str) -> None:
        for dep in stage_entry(lock, name).get("deps", []):
            for path, maker in makers.items():
                inside = f"{path}/".startswith(f"{dep['path']}/") or f"{dep['path']}/".startswith(f"{path}/")
                if inside and maker not in (*found, stage):
                    visit(maker)
        if name != stage and name not in found:
            found.append(name)

    visit(stage)
    return found


def locking_commit(root: Path, stage: str) -> str:
    """The commit that last changed a stage's entry in dvc.lock: hash, day, subject; or why there is none."""
    now = _lock_block((root / "dvc.lock").read_text(encoding="utf-8"), stage)
    log = _git(root, "log", "--format=%H", "--", "dvc.lock")
    found = ""
    for commit in log.split():
        if _lock_block(_git(root, "show", f"{commit}:dvc.lock"), stage) != now:
            break
        found = commit
    if not found:
        return "not committed yet" if log else "not under git"
    return _git(root, "show", "-s", "--format=%h %as %s", found).strip()


def _lock_block(text: str, stage: str) -> str:
    """The lines of one stage in a lock file."""
    found = re.search(rf"^  {re.escape(stage)}:\n(?:    .*\n)*", text, re.MULTILINE)
    return found[0] if found else ""


def _git(root: Path, *words: str) -> str:
    try:
        return run_git(root, *words).decode()
    except subprocess.CalledProcessError:
        return ""


def trace(root: Path, record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """The whole chain of one value, as (what, found) lines: report, stage, what it read, commit.

    Raises:
        MissingInput: no such value, or no dvc.lock.
        BadData: dvc.lock does not know the stage.
    """
    value = find_value(record, name)
    if not (root / "dvc.lock").exists():
        raise MissingInput("dvc.lock is missing: run `dvc repro` to make it")
    entries_of((root / "dvc.lock").read_bytes())  # paths out of the project are refused
    lock = read_yaml(root / "dvc.lock")
    entry = stage_entry(lock, value["stage"])
    lines = [
        ("value", f"{value['value']!r} {value['unit']}, {value['known']}"),
        ("source", value["source"]),
        ("report", value["report"]),
        ("stage", f"{value['stage']}  ({entry['cmd']})"),
        ("code", f"SHA-256 {value['code_sha256']}"),
    ]
    for key, what in (("data_sha256", "data"), ("weights_sha256", "weights")):
        if value[key]:
            lines.append((what, f"SHA-256 {value[key]}"))
    lines += [("read", f"{dep['path']}  md5 {dep['md5']}") for dep in entry.get("deps", [])]
    lines += [("wrote", f"{out['path']}  md5 {out['md5']}") for out in entry.get("outs", [])]
    lines.append(("stands on", " -> ".join(upstream(lock, value["stage"])) or "params.yaml alone"))
    lines.append(("commit", locking_commit(root, value["stage"])))
    return lines
