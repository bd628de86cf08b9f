"""The gate's verdict as a table, as Markdown for a pull request, as JUnit XML and as GitHub's annotations."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from compactgpt.common.escaping import markdown_text
from compactgpt.common.storage import write_text
from compactgpt.gate.gate import Check, Point, Verdict

MARKER = "<!-- compactgpt gate -->"  # the first line, by which scripts/comment.py finds the comment again
_ANNOTATED_FILE = "reports/evaluation.json"
_MOST_ANNOTATIONS = 10  # of one kind in one step: GitHub drops the others
_MOST_LINES = 5  # failures and warnings above the table: the comment fits one screen
_MOST_POINTS = 40  # of a curve
_MARKS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "info": ""}
_EMOJI = {"pass": "✅", "warn": "⚠️", "fail": "❌", "info": ""}
_HEADER = ("", "", "accepted", "now", "worse by", "chance", "tolerance")
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2


def publish(verdict: Verdict, markdown_file: Path | None, junit_file: Path | None) -> None:
    """Write the files that were asked for; inside GitHub Actions also annotations and the step's summary."""
    if markdown_file:
        write_text(markdown_file, markdown(verdict))
    if junit_file:
        write_text(junit_file, junit(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stdout.writelines(f"{line}\n" for line in annotations(verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:  # other steps' lines stay
            file.write(markdown(verdict))


def headline(verdict: Verdict) -> str:
    """Return the verdict in one line."""
    if failed := verdict.failures:
        return f"gate: failed ({', '.join(check.name for check in failed)})"
    warned = [check.name for check in verdict.checks if check.status == "warn"]
    return "gate: passed" + (f", with warnings ({', '.join(warned)})" if warned else "")


def terminal(verdict: Verdict) -> str:
    """Render a table of plain text."""
    rows = [_HEADER, *(_cells(check) for check in [*verdict.metrics, *verdict.watched])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_against(verdict), ""]
    for row in rows:
        mark, name, *numbers = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        right = [cell.strip().rjust(width) for cell, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join([mark, name, *right]).rstrip())
    notes = [check for check in verdict.checks if check.says]
    lines += ["", *(f"{_MARKS[check.status]:4}  {check.name}: {check.says}" for check in notes)]
    return "\n".join([*lines, "", headline(verdict)])


def markdown(verdict: Verdict) -> str:
    """Render the comment on a pull request: verdict, metrics and loss curve, and the rest folded."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["markdown"] = _plain
    failed = verdict.failures
    attention = failed + [check for check in verdict.checks if check.status == "warn"]
    return environment.get_template("comment.md.j2").render(
        marker=_markup(MARKER),
        icon=_EMOJI[attention[0].status if attention else "pass"],
        headline=headline(verdict).capitalize(),
        against=_against(verdict),
        attention=attention[:_MOST_LINES],
        more=max(0, len(attention) - _MOST_LINES),
        chart=_chart(verdict.curve),
        marks=_EMOJI,
        cells=_cells,
        checks=verdict.checks,
        **{name: getattr(verdict, name) for name in ("metrics", "watched", "differences")},
    )


def _chart(curve: Sequence[Point]) -> dict[str, Any] | None:
    """Prepare a loss curve for Mermaid's xychart, whose points have equal distances."""
    known = [(step, train, val) for step, train, val in curve if train is not None and val is not None]
    if len(known) < 2:
        return None
    steps, train, val = np.array(known, np.float64).T
    points = np.linspace(steps[0], steps[-1], min(len(known), _MOST_POINTS))
    lines = {name: np.interp(points, steps, line) for name, line in (("train", train), ("val", val))}
    both = np.concatenate([*lines.values()])
    return {
        "first": int(steps[0]),
        "last": int(steps[-1]),
        "low": round(float(both.min()) - 0.05, 2),
        "high": round(float(both.max()) + 0.05, 2),
        **{name: [round(value, 3) for value in line.tolist()] for name, line in lines.items()},
    }


def junit(verdict: Verdict) -> str:
    """Render JUnit XML with a test case per check (Jenkins' junit-10.xsd, which pytest's xunit2 follows)."""
    counts = {"tests": str(len(verdict.checks)), "failures": str(len(verdict.failures)), "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        suites, "testsuite", {"name": "gate", **counts, "skipped": "0", "time": "0"}
    )
    for kind, checks in (("guards", verdict.guards), ("metrics", verdict.metrics)):
        for check in checks:
            case = ElementTree.SubElement(
                suite, "testcase", {"classname": f"gate.{kind}", "name": _xml(check.name), "time": "0"}
            )
            if check.status == "fail":
                failure = ElementTree.SubElement(
                    case, "failure", {"message": _xml(_sentence(check)), "type": "regression"}
                )
                failure.text = _xml(_sentence(check))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(f"{check.status}: {_sentence(check)}")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def annotations(verdict: Verdict) -> Iterator[str]:
    """Yield GitHub's workflow commands: an error for each failure, a warning for each warning."""
    for status, command in (("fail", "error"), ("warn", "warning")):
        found = [check for check in verdict.checks if check.status == status]
        for check in found[:_MOST_ANNOTATIONS]:
            title = _property(f"gate: {check.name}")
            yield f"::{command} file={_ANNOTATED_FILE},title={title}::{_data(_sentence(check))}"


def _against(verdict: Verdict) -> str:
    return f"against {verdict.against}" + (f", accepted because: {verdict.reason}" if verdict.reason else "")


def _sentence(check: Check) -> str:
    """Describe a check with its numbers, where there is no table."""
    then, now, change, chance, tolerance = _cells(check)[2:]
    parts = [f"{then or 'nothing'} -> {now or 'nothing'}"] if then or now else []
    if change:
        parts.append(f"worse by {change}" + (f" ({chance})" if chance else "") + f", tolerated {tolerance}")
    return "; ".join([*parts, check.says] if check.says else parts)


def _cells(check: Check) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f} %"

    chance = "" if check.bounds is None else f"{share(check.bounds[0])} to {share(check.bounds[1])}"
    return (_MARKS[check.status], check.name, number(check.then), number(check.now), share(check.change),
            chance, share(check.tolerance))  # fmt: skip


def _plain(text: str) -> Any:
    """Escape text so that Markdown and HTML leave it as it is, in a table too."""
    return _markup(markdown_text(" ".join(text.split())))


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 (escaped above, or ours)


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)


def _data(text: str) -> str:
    """Escape the message of a workflow command, as GitHub's toolkit does (core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
