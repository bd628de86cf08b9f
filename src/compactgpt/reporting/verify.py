"""Is what the repository shows what its inputs give? Every file by its hash, every cell made anew.

Four looks, each names what differs:

    lock        dvc.lock is as DVC writes it, fits dvc.yaml and params.yaml, and every file that it names and
                that lies here has the hash, the size and the number of files that it says
    manifests   each folder's own list of SHA-256, where the folder has one
    numbers     the estimate, and from the sums by document every loss, perplexity, interval and accuracy
    renderings  the record from the reports, and tables, pictures, page and card from the record: to the byte

What `dvc pull` has not brought is named as unchecked, never taken as right.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compactgpt.common.errors import UserError
from compactgpt.common.sections import read_yaml
from compactgpt.common.storage import MANIFEST, json_bytes, read_json, verified_manifest
from compactgpt.config import Params, load_params
from compactgpt.evaluation.likelihood import figures, read_totals
from compactgpt.evaluation.metrics import wilson
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.sweep import read_sweep
from compactgpt.reporting.evidence import build_record
from compactgpt.reporting.html import RECORD, render_files
from compactgpt.reporting.markdown import render_quoted_tables, replace_tables
from compactgpt.reporting.schemas import COMPACT, read_sources
from compactgpt.tracking.dvc_files import entries_of

LOCK = "dvc.lock"
_SHOWN = 5  # differences of one file that are told
_IGNORED = {"__pycache__"}  # as .dvcignore has it
_FROM_DVC = ("data/", "models/")  # not in git: a clone has them after `dvc pull`


@dataclass
class Verification:
    """What was found."""

    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)  # how many, by what
    notes: list[str] = field(default_factory=list)  # worth knowing, and no difference

    def lines(self) -> list[str]:
        """What was found, for people."""
        return [
            *(f"{what}: {number} checked" for what, number in self.checked.items()),
            *(f"not checked, since it is not here (`dvc pull`): {path}" for path in self.unchecked),
            *(f"note: {note}" for note in self.notes),
            *([f"differs: {line}" for line in self.differences] or ["nothing differs"]),
        ]

    def count(self, what: str, number: int = 1) -> None:
        """Note that something was compared."""
        self.checked[what] = self.checked.get(what, 0) + number

    def differ(self, path: str, lines: Iterable[str]) -> None:
        """Note the first differences of a file."""
        told = list(lines)
        self.differences += [f"{path}: {line}" for line in told[:_SHOWN]]
        if len(told) > _SHOWN:
            self.differences.append(f"{path}: and {len(told) - _SHOWN} more")


def verify(root: Path) -> Verification:
    """Take all four looks at a repository.

    Args:
        root: where dvc.yaml lies.

    Raises:
        UserError: params.yaml can't be read; everything else is a difference.
    """
    found, params = Verification(), load_params(root / "params.yaml")
    check_lock(root, params, found)
    for check in (check_manifests, check_estimate, check_numbers, check_renderings):
        looked_at(check, root, params, found)
    found.differences = list(dict.fromkeys(found.differences))
    return found


def looked_at(
    check: Callable[[Path, Params, Verification], None], root: Path, params: Params, found: Verification
) -> None:
    """Take one look: what can't be made sense of is a difference."""
    try:
        check(root, params, found)
    except UserError as error:
        found.differences.append(str(error))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        found.differences.append(f"a report is not what its stage writes ({error!r}): run `dvc repro`")


# --- lock


def check_lock(root: Path, params: Params, found: Verification) -> None:
    """Compare dvc.lock with its own form, with dvc.yaml, with params.yaml, and with the files."""
    try:
        raw = (root / LOCK).read_text(encoding="utf-8")
        entries_of(raw.encode())  # paths out of the project are refused
        lock = read_yaml(root / LOCK)
        stages: Mapping[str, Any] = lock["stages"]
    except (OSError, UnicodeDecodeError, UserError, KeyError, TypeError) as error:
        found.differences.append(f"{LOCK} can't be read ({error}): take it from git, or run `dvc repro`")
        return
    if _as_dvc_writes(lock) != raw or lock.get("schema") != "2.0":
        found.differences.append(f"{LOCK} is not as DVC writes it: take it from git, or run `dvc repro`")
    wanted = dict(_pipeline(root, params))
    for name in sorted(set(wanted) ^ set(stages)):
        where = "dvc.yaml" if name in stages else LOCK
        found.differences.append(f"{LOCK}: stage {name} is not in {where}")
    tree, hashes = read_yaml(root / "params.yaml"), _Hashes(root)
    for name in sorted(set(wanted) & set(stages)):
        try:
            _check_stage(f"{LOCK}: {name}", stages[name], wanted[name], tree, found)
            for entry in (*stages[name].get("deps", ()), *stages[name].get("outs", ())):
                _check_entry(entry, hashes, found)
        except (KeyError, TypeError, AttributeError) as error:
            found.differences.append(f"{LOCK}: {name} is no entry of DVC's ({error!r}): take it from git")


def _as_dvc_writes(lock: Any) -> str:
    from ruamel.yaml import YAML

    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(lock, text)
    return text.getvalue()


def _pipeline(root: Path, params: Params) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages of dvc.yaml, a matrix unrolled."""
    for name, body in read_yaml(root / "dvc.yaml")["stages"].items():
        if "matrix" not in body:
            yield name, body
            continue
        for item in params.baseline.names:
            filled = json.loads(json.dumps(body).replace("${item.name}", item))
            yield f"{name}@{item}", filled


def _check_stage(
    where: str, entry: Mapping[str, Any], body: Mapping[str, Any], tree: Any, found: Verification
) -> None:
    """One stage: its command, the paths that it names, the parameters that it was run with."""
    outs = [path for kind in ("outs", "metrics", "plots") for path in _paths(body.get(kind, ()))]
    for key, paths in (("deps", _paths(body["deps"])), ("outs", outs)):
        named = [one["path"] for one in entry.get(key, ())]
        if sorted(named) != sorted(paths):
            odd = ", ".join(sorted(set(named) ^ set(paths)))
            found.differences.append(f"{where}: {key} are not dvc.yaml's ({odd}): run `dvc repro`")
    if entry.get("cmd") != body["cmd"]:
        found.differences.append(f"{where}: cmd is not dvc.yaml's: run `dvc repro`")
    told = entry.get("params", {}).get("params.yaml", {})
    for key in sorted({*told, *body.get("params", ())}):
        if key not in told or told[key] != _look_up(tree, key):
            found.differences.append(f"{where}: {key} is not params.yaml's: run `dvc repro`")
    found.count("stages")


def _paths(listed: Iterable[Any]) -> list[str]:
    return [path for one in listed for path in (one if isinstance(one, dict) else [one])]


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


class _Hashes:
    """MD5, size and number of files of paths, as DVC counts them; each is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, path: str) -> dict[str, Any]:
        """What dvc.lock should say of a path."""
        if path not in self._known:
            place = self.root / path
            self._known[path] = self._folder(place) if place.is_dir() else self._file(place)
        return self._known[path]

    def _file(self, place: Path) -> dict[str, Any]:
        with open(place, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return {"md5": digest, "size": place.stat().st_size}

    def _folder(self, place: Path) -> dict[str, Any]:
        files = {
            path.relative_to(place).as_posix(): self._file(path)
            for path in place.rglob("*")
            if path.is_file() and not _IGNORED & set(path.parts) and path.suffix != ".pyc"
        }
        listing = [{"md5": files[name]["md5"], "relpath": name} for name in sorted(files)]
        text = json.dumps(listing, sort_keys=True).encode()
        digest = hashlib.md5(text, usedforsecurity=False).hexdigest() + ".dir"
        size = sum(one["size"] for one in files.values())
        return {"md5": digest, "size": size, "nfiles": len(files), "files": files}


def _check_entry(entry: Mapping[str, Any], hashes: _Hashes, found: Verification) -> None:
    path = entry["path"]
    if odd := set(entry) - {"path", "hash", "md5", "size", "nfiles"}:
        found.differences.append(
            f"{LOCK}: {path} has {sorted(odd)}, which DVC does not write: take it from git"
        )
    if not (hashes.root / path).exists():
        if path.startswith(_FROM_DVC):
            found.unchecked += [path] if path not in found.unchecked else []
        else:
            found.differences.append(f"{path} is missing: take it from git, or run `dvc repro`")
        return
    now = hashes.of(path)
    found.count("files and folders")
    wrong = [key for key in ("md5", "size", "nfiles") if entry.get(key) != now.get(key)]
    if wrong or entry.get("hash") != "md5":
        inside = _altered_inside(hashes.root, path, entry, now)
        found.differences.append(
            f"{inside or path} is not what {LOCK} says ({', '.join(wrong) or 'hash'}): it was altered, or "
            "its stage has not run since; `dvc repro` makes it anew"
        )


def _altered_inside(root: Path, path: str, entry: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the file of a folder that differs, where DVC's cache still has the folder's listing."""
    digest = str(entry["md5"])
    listing = root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    if "files" not in now or not listing.is_file():
        return ""
    try:
        told = {one["relpath"]: one["md5"] for one in json.loads(listing.read_bytes())}
    except (ValueError, KeyError, TypeError):
        return ""
    have = {name: one["md5"] for name, one in now["files"].items()}
    return ", ".join(
        f"{path}/{name}" for name in sorted(set(told) | set(have)) if told.get(name) != have.get(name)
    )


# --- manifests and numbers


def check_manifests(root: Path, _params: Params, found: Verification) -> None:
    """Compare each folder that has a manifest with it: SHA-256 and size of every file."""
    for manifest in sorted((*root.glob("data/*/" + MANIFEST), *root.glob("models/*/" + MANIFEST))):
        try:
            files = verified_manifest(manifest.parent)["files"]
            found.count("files of manifests", len(files))
        except UserError as error:
            found.differences.append(str(error).replace(f"{root}/", ""))


def check_estimate(root: Path, params: Params, found: Verification) -> None:
    """Make the estimate anew: it follows from params.yaml and the ladder alone."""
    path = "reports/estimate.json"
    made = estimate(params, read_sweep(root / "results/ladder.json"))
    found.differ(path, differences(json.loads(json_bytes(made)), read_json(root / path)))
    found.count("estimates")


def check_numbers(root: Path, params: Params, found: Verification) -> None:
    """Make each model's figures anew from its sums by document, and its accuracies from its hits."""
    reports = {COMPACT: ("reports/evaluation.json", "data/evaluation/compact.parquet")}
    for name in params.baseline.names:
        reports[name] = (f"reports/baseline/{name}.json", f"data/baseline/{name}.parquet")
    for report, sums in reports.values():
        told = read_json(root / report)
        made: dict[str, Any] = _accuracies(told)
        if (root / sums).exists():
            totals = read_totals(root / sums)
            likelihood = params.evaluation.likelihood
            made |= figures(totals.nats, totals, likelihood)
            views = {view: figures(nats, totals, likelihood) for view, nats in totals.views.items()}
            made |= {"views": views} if views else {}
            made["validation"] = {
                "documents": len(totals.ids),
                "tokens": int(totals.tokens.sum()),
                "bytes": int(totals.bytes.sum()),
            }
        elif sums not in found.unchecked:
            found.unchecked.append(sums)
        found.differ(report, differences(made, told, partly=True))
        found.count("reports of models")


def _accuracies(report: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for task, answers in report.get("tasks", {}).items():
        hits = answers.get("hits", "")
        if hits:
            share = wilson(hits.count("1"), len(hits))
            made[task] = {"accuracy": {"value": share.value, "low": share.low, "high": share.high}}
    return {"tasks": made} if made else {}


# --- renderings


def check_renderings(root: Path, params: Params, found: Verification) -> None:
    """Make the record anew where its inputs are here, and from it every table, picture and page."""
    reports = root / "reports"
    needed = ("models/compact/" + MANIFEST, "data/evaluation/compact.parquet")
    if all((root / path).exists() for path in needed):
        sources = read_sources(root, reports, root / "data", root / "models", params.baseline.names)
        record = json.loads(json_bytes(build_record(sources, params.evaluation.likelihood)))
    else:
        found.unchecked.append(f"reports/{RECORD} from the reports (only what is shown of it)")
        record = read_json(reports / RECORD)
    for name, content in render_files(record, params.comparison.language).items():
        path = reports / name
        now = path.read_bytes() if path.exists() else b""
        if now != content:
            cells = _cells(record, now) if name == RECORD else []
            found.differ(f"reports/{name}", cells or [_first_difference(content, now)])
        found.count("renderings")
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        if replace_tables(text, render_quoted_tables(record)) != text:
            # Every run of a user has other tables. test_comparison.py compares the committed README.md.
            found.notes.append("README.md quotes the tables of another run: `make readme` replaces them")


def _cells(record: Any, now: bytes) -> list[str]:
    """The cells in which another record differs; none where it can't be read or they are equal."""
    try:
        return list(differences(record, json.loads(now)))
    except ValueError:
        return []


def differences(made: Any, told: Any, where: str = "", *, partly: bool = False) -> Iterator[str]:
    """Name the leaves in which two JSON values differ; items of lists by their `id` where they have one.

    Args:
        made: what should be there.
        told: what is there.
        where: the path so far.
        partly: what `made` lacks is not looked at.
    """
    if isinstance(made, dict) and isinstance(told, dict):
        for key in made if partly else sorted({*made, *told}):
            place = f"{where}.{key}" if where else str(key)
            if key not in told or key not in made:
                yield f"{place} {'is missing' if key in made else 'does not belong there'}"
            else:
                yield from differences(made[key], told[key], place, partly=partly)
    elif isinstance(made, list) and isinstance(told, list) and len(made) == len(told):
        for number, (one, other) in enumerate(zip(made, told, strict=True)):
            name = one.get("id", number) if isinstance(one, dict) else number
            yield from differences(one, other, f"{where}[{name}]", partly=partly)
    elif json_bytes(made) != json_bytes(told):
        yield f"{where} is {_short(told)}, and {_short(made)} is made of the inputs"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


_CELL = re.compile(r'data-id="([^"]+)"|-v-([^"]+)"|^([\w.@-]+),|`([\w-]+\.[\w.-]+)`')


def _first_difference(made: bytes, now: bytes) -> str:
    """Where two texts part: the line, and the cell whose id stands before it."""
    if not now:
        return "is missing: run `dvc repro`"
    place = next(
        (i for i, (a, b) in enumerate(zip(made, now, strict=False)) if a != b), min(len(made), len(now))
    )
    if made.startswith(b"\x89PNG"):
        return f"is another picture from byte {place:,} on"
    line = made.count(b"\n", 0, place) + 1
    before = made[max(0, place - 4000) : place].decode("utf-8", "replace")
    cells = [next(filter(None, groups)) for groups in _CELL.findall(before)]
    near = f", behind {cells[-1]}" if cells else ""
    wanted = made[max(0, place - 20) : place + 20].decode("utf-8", "replace")
    return f"line {line}{near}: not what is made of the inputs, ...{wanted}..."
