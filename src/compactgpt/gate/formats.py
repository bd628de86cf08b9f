"""Render the gate's verdict as a table, as Markdown and as JUnit XML."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from compactgpt.common.errors import printable
from compactgpt.common.storage import write_text
from compactgpt.gate.gate import Check, Verdict

_TEMPLATE = Path(__file__).parent / "templates/comment.md.j2"
_MOST_LINES = 5  # the pull request's comment lists at most this many failures and warnings
_MOST_POINTS = 40  # maximum number of points of a curve in the chart
_WORDS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "info": ""}  # status -> word in the terminal
_ICONS = {"pass": "✅", "warn": "⚠️", "fail": "❌", "info": ""}  # status -> icon in the pull request's comment
_LARGE = 1e9  # a diverged model has values of up to 300 digits: from here on, an exponent is shown
_HEADER = ("", "", "accepted", "now", "worse by", "chance", "tolerance")


def publish(verdict: Verdict, markdown_file: Path | None, junit_file: Path | None) -> None:
    """Write the verdict to the given files. Inside GitHub Actions, also add it to the job's summary."""
    if markdown_file:
        write_text(markdown_file, render_markdown(verdict))
    if junit_file:
        write_text(junit_file, render_junit(verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(render_markdown(verdict))


def render_terminal(verdict: Verdict) -> str:
    """Return the verdict as a plain-text table, with the messages of all checks."""
    rows = [_HEADER, *(_cells(check) for check in [*verdict.metrics, *verdict.watched])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_against(verdict), ""]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    shown = [check for check in [*verdict.checks, *verdict.watched] if check.says]
    notes = [f"{_WORDS[check.status]:4}  {check.name}: {check.says}" for check in shown]
    return "\n".join([*lines, "", *notes, "", _headline(verdict)])


def render_markdown(verdict: Verdict) -> str:
    """Return the verdict as the Markdown comment of a pull request."""
    from compactgpt.reporting.templating import markdown_environment

    attention = verdict.failures + [check for check in verdict.checks if check.status == "warn"]
    template = markdown_environment().from_string(_TEMPLATE.read_text("utf-8"))
    return template.render(
        verdict=verdict,
        icon=_ICONS[attention[0].status if attention else "pass"],
        icons=_ICONS,
        headline=_headline(verdict).capitalize(),
        against=_against(verdict),
        attention=attention,
        most_lines=_MOST_LINES,
        chart=_make_chart(verdict.curve),
        cells=_cells,
    )


def render_junit(verdict: Verdict) -> str:
    """Return the verdict as JUnit XML (Jenkins' junit-10.xsd): one test case for each check."""
    counts = {"tests": str(len(verdict.checks)), "failures": str(len(verdict.failures))}
    suite = ElementTree.Element("testsuite", counts, name="gate")
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=printable(check.name))
        values = [
            f"{name} {cell}" for name, cell in zip(_HEADER, _cells(check), strict=True) if name and cell
        ]
        message = printable("; ".join([*values, check.says]))
        if check.status == "fail":
            ElementTree.SubElement(case, "failure", message=message)
        else:
            ElementTree.SubElement(case, "system-out").text = f"{check.status}: {message}"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suite, "unicode")}\n'


def _make_chart(curve: Sequence[Mapping[str, float | None]]) -> dict[str, Any] | None:
    """Return the values for a Mermaid chart of the losses; None with fewer than two steps."""
    rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in curve]
    known = [row for row in rows if None not in row]
    if len(known) < 2:
        return None
    steps, *losses = np.array(known, np.float64).T
    # Choose steps at equal distances, because Mermaid draws the points of a line at equal distances.
    even = np.linspace(steps[0], steps[-1], min(len(known), _MOST_POINTS))
    lines = np.array([np.interp(even, steps, values) for values in losses]).round(3)  # (2 curves, points)
    return {
        "first": int(steps[0]),
        "last": int(steps[-1]),
        "low": round(float(lines.min()) - 0.05, 2),
        "high": round(float(lines.max()) + 0.05, 2),
        "lines": [str(line) for line in lines.tolist()],
    }


def _headline(verdict: Verdict) -> str:
    """Return `gate: failed` and the failed checks, or `gate: passed` and the checks with warnings."""
    if failed := verdict.failures:
        return f"gate: failed ({', '.join(check.name for check in failed)})"
    warned = [check.name for check in verdict.checks if check.status == "warn"]
    return "gate: passed" + (f", with warnings ({', '.join(warned)})" if warned else "")


def _against(verdict: Verdict) -> str:
    return f"against {verdict.against}" + (f", accepted because: {verdict.reason}" if verdict.reason else "")


def _cells(check: Check) -> tuple[str, ...]:
    """Return the table row of a check: one cell for each column of `_HEADER`."""
    low, high = check.bounds or (None, None)
    chance = f"{_percent(low)} to {_percent(high)}" if check.bounds else ""
    values = (_number(check.then), _number(check.now), _percent(check.change), chance)
    return (_WORDS[check.status], check.name, *values, _percent(check.tolerance))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= _LARGE:
        return f"{value:.2e}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    percent = 100 * share
    if math.isinf(percent):
        return "infinite"
    return f"{percent:.2e} %" if percent >= _LARGE else f"{percent:.2f} %"
