"""Measure the code: length of functions, share of functions with a docstring, comments per 100 lines.

    python benchmarks/code.py src/compactgpt stages

A function's lines are all from `def` to its end, signature and docstring too; methods and nested ones count.
"""

import ast
import statistics
import sys
import tokenize
from pathlib import Path

LONG = 40  # lines


def main(folders: list[str]) -> None:
    functions, documented, comments, lines = [], 0, 0, 0
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    for path in files:
        text = path.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        with path.open("rb") as file:
            comments += sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{path}: {node.name}"))
                documented += ast.get_docstring(node) is not None
    functions.sort(reverse=True)
    lengths = [length for length, _ in functions]
    ninetieth = statistics.quantiles(lengths, n=10, method="inclusive")[8]
    print(f"{len(files)} files, {lines:,} lines, {len(lengths):,} functions")
    print(f"lines of one: median {statistics.median(lengths):g}, 90 % {ninetieth:g}, longest {lengths[0]}")
    print(f"with a docstring: {documented / len(lengths):.0%}")
    print(f"comments per 100 lines: {100 * comments / lines:.1f}")
    for length, name in functions:
        if length > LONG:
            print(f"{length:4} {name}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["src/compactgpt", "stages"])
