"""Trace a value of reports/evidence.json to its code, input files and commit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compactgpt.common.errors import BadData, MissingInput, UserError
from compactgpt.common.git import git_text
from compactgpt.common.storage import sha256_file
from compactgpt.tracking.dvc_files import CODE, Folder, deps, outs, read_entries, read_stages, stages_before

RECORD = Path("reports/evidence.json")


def code_hashes(root: Path) -> dict[str, str]:
    """Return a dict: stage -> hash of the stage's code.

    The hash is the SHA-256 of a text. For each Python file that the stage depends on, the text has the line
    `<SHA-256 of the file>  <path>`. The lines are sorted by path.
    """
    hashes = {}
    for stage, body in read_stages(Folder(root)).items():
        code = [root / path for path in body.get("deps", ()) if f"{path}/".startswith(CODE)]
        files = {file for path in code for file in (path.rglob("*.py") if path.is_dir() else [path])}
        lines = [f"{sha256_file(file)}  {file.relative_to(root)}\n" for file in sorted(files)]
        hashes[stage] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashes


def find_value(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the value with the id `name` in `record`, the content of reports/evidence.json.

    Raises MissingInput if no value has this id. The message lists similar ids.
    """
    values: dict[str, dict[str, Any]] = {item["id"]: item for item in record["evidence"]}
    if name not in values:
        similar = [known for known in values if name in known or known.rpartition(".")[0] == name][:8]
        hint = f"similar ids: {', '.join(similar)}" if similar else "reports/comparison.csv lists all values"
        raise MissingInput(f"no value has the id {name}; {hint}")
    return values[name]


def trace(root: Path, value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the origin of a value as (label, text) pairs: report, stage, code, input files, commit.

    Raises BadData if dvc.lock has no entry for the value's stage.
    """
    stage = value["stage"]
    entry = read_entries(Folder(root)).get(stage)
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
    results = outs(entry)
    lines.append(("commit", find_commit(root, results.get(value["report"], results.get(str(RECORD), "")))))
    return lines


def find_commit(root: Path, md5: str) -> str:
    """Return hash, date and subject of the first commit whose dvc.lock contains `md5`, the hash of an output.

    Without such a commit, return `not committed yet`. Without a git repository, return `not under git`.
    """
    try:
        found = git_text(root, "log", "--reverse", "--format=%h %as %s", f"-Smd5: {md5}", "--", "dvc.lock")
    except UserError:
        return "not under git"
    return found.partition("\n")[0] or "not committed yet"
