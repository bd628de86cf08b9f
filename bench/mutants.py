"""Mutation testing: of small changes to the rooms that measure, how many does a test see?

`make test-mutants` runs it: half an hour of one core, less with ROOMS=metrics. mutmut makes the changes
and runs, in a fork for each, the tests that reach the changed function; pyproject.toml has its settings.
It leaves decorated functions alone, so it works on a copy in .state/mutants, where `@property` above a
function is `function = property(function)` in the empty line below it: the same code, on the same lines.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COPY = ROOT / ".state/mutants"
ROOMS = ("metrics", "evaluation", "claims", "regression")
WANTED = 0.9  # share of a room's mutants that tests must see

# Changes that nobody could see: (room, the line as changed) -> why. They count as survivors all the same.
_CAST, _TWO, _COUNTED = "cast does nothing", "two names, two sizes", "the lengths are compared before"
_SIZES = 'zip(("context", "stride"), model.view_sizes(cast(View, view), likelihood)'
EQUIVALENT = {
    ("metrics", "chunk = max(2, 4_000_000 // n)"): "the draws are the same in chunks of any size",
    ("metrics", "chunk = max(1, 4000001 // n)"): "the draws are the same in chunks of any size",
    ("evaluation", f"{_SIZES}, strict=None)"): _TWO,
    ("evaluation", f"{_SIZES}, strict=False)"): _TWO,
    ("evaluation", f"{_SIZES}, )"): _TWO,
    ("evaluation", f"{_SIZES}, strict=True)".replace("cast(View", "cast(None")): _CAST,
    ("evaluation", "units.astype(None),"): "None is float64 to numpy",
    ("evaluation", "for document in np.flatnonzero(~np.isfinite(nats))[:2]:"): "the first ends the loop",
    ("regression", 'pairs = list(zip(before["hits"], after["hits"], strict=None))'): _COUNTED,
    ("regression", 'pairs = list(zip(before["hits"], after["hits"], strict=False))'): _COUNTED,
    ("regression", 'pairs = list(zip(before["hits"], after["hits"], ))'): _COUNTED,
    ("regression", "return float(sum(math.comb(flips, k) for k in range(lost, flips + 2)) / 2**flips)"):
        "of n things one can't take n + 1",
}  # fmt: skip

# For the copy's conftest.py: a mutant ends with the first test that sees it, so quick ones go first.
QUICK_FIRST = """

def pytest_collection_modifyitems(items):
    import json
    from pathlib import Path

    if (stats := Path("mutmut-stats.json")).exists():
        seconds = json.loads(stats.read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0))
"""


def undecorated(source: str) -> str:
    """Apply the decorators of methods below them instead of above, no line moved."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and method.decorator_list:
                value = method.name
                for decorator in reversed(method.decorator_list):
                    value = f"{ast.unparse(decorator)}({value})"
                    lines[decorator.lineno - 1] = ""
                assert method.end_lineno is not None
                assert not lines[method.end_lineno]
                lines[method.end_lineno] = " " * method.col_offset + f"{method.name} = {value}"
    return "\n".join(lines)


def copy_project() -> None:
    """Fill COPY with what git would keep, the rooms undecorated."""
    shutil.rmtree(COPY, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, COPY / name)
    with open(COPY / "tests/conftest.py", "a") as conftest:
        conftest.write(QUICK_FIRST)
    for room in ROOMS:
        path = COPY / f"src/compactgpt/{room}.py"
        path.write_text(undecorated(path.read_text()))


def change(name: str, room: str) -> tuple[int, str, str]:
    """A mutant's line in its room, that line, and what became of it."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    path = f"src/compactgpt/{room}.py"
    lines = get_diff_for_mutant(name, path=path).split("\n")[2:]
    (start,) = map(int, re.findall(r"^@@ -(\d+)", lines[0]))
    first = next(row for row, line in enumerate(lines[1:]) if line.startswith(("-", "+")))
    function, owner = orig_function_and_class_names_from_key(name)
    place: Any = ast.parse(Path(path).read_text())
    for wanted in filter(None, (owner, function)):
        place = next(node for node in place.body if getattr(node, "name", "") == wanted.split(".")[-1])
    old, new = ("\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return place.lineno + start - 1 + first, old, new


def report(rooms: list[str]) -> bool:
    """Print what became of the mutants; whether enough of every room were seen."""
    from mutmut.stats import status_by_exit_code

    good = True
    for room in rooms:
        codes = json.loads(Path(f"mutants/src/compactgpt/{room}.py.meta").read_text())["exit_code_by_key"]
        found = {name: status_by_exit_code[code] for name, code in codes.items()}
        counts = Counter(found.values())
        seen = counts["killed"] + counts["timeout"]
        alike = 0
        for name, status in found.items():
            if status not in ("killed", "timeout"):
                line, old, new = change(name, room)
                reason = EQUIVALENT.get((room, new), "")
                alike += bool(reason)
                print(f"{room}.py:{line}: {status}{reason and ', equivalent: ' + reason}")
                print(f"  - {old}\n  + {new}")
        share = seen / len(found)
        good = good and share >= WANTED
        print(f"{room}: {share:.1%} of {len(found)} seen: {counts['killed']} killed, ", end="")
        print(f"{counts['timeout']} timeouts; {len(found) - seen} not, {alike} of them equivalent\n")
    return good


def run(rooms: list[str]) -> None:
    """Let mutmut make the mutants and try them; what it says is in the file `log`."""
    command = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "run", "--max-children", "1"]
    names = [f"compactgpt.{room}.*" for room in rooms]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with open("log", "w") as log:
        subprocess.run([*command, *names], check=True, stdout=log, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", default=ROOMS, help=" ".join(ROOMS))
    parser.add_argument("--again", action="store_true", help="report on the last run")
    words = parser.parse_args()
    if not words.again:
        copy_project()
    os.chdir(COPY)
    if not words.again:
        run(list(words.rooms))
    if not report(list(words.rooms)):
        raise SystemExit(f"fewer than {WANTED:.0%} of a room's mutants were seen: a test is missing")


if __name__ == "__main__":
    main()
