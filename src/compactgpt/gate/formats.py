"""Render the gate's verdict as a table, as Markdown for a pull request, as JUnit XML and as annotations."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compactgpt.common.escaping import markdown_text
from compactgpt.common.storage import write_text
from compactgpt.gate.gate import Check, Point, Verdict

MARKER = "<!-- compactgpt gate -->"  # first line of the Markdown
_ANNOTATED_FILE = "reports/evaluation.json"
_MOST_ANNOTATIONS = 10  # GitHub's limit for each kind of annotation in one step
_MOST_LINES = 5  # failures and warnings above the table, so that the comment fits on one screen
_MOST_POINTS = 40  # points of a curve in the chart
_WORDS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "info": ""}
_ICONS = {"pass": "✅", "warn": "⚠️", "fail": "❌", "info": ""}
_HEADER = ("", "", "accepted", "now", "worse by", "chance", "tolerance")
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2


def publish(verdict: Verdict, markdown_file: Path | None, junit_file: Path | None) -> None:
    """Write the verdict to files; inside GitHub Actions, also print annotations and write the step's summary.

    Args:
        verdict: the verdict.
        markdown_file: the Markdown file to write, if any.
        junit_file: the JUnit XML file to write, if any.
    """
    if markdown_file:
        write_text(markdown_file, render_markdown(verdict))
    if junit_file:
        write_text(junit_file, render_junit(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stdout.writelines(f"{line}\n" for line in annotations(verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:  # append: other steps write to this file, too
            file.write(render_markdown(verdict))


def headline(verdict: Verdict) -> str:
    """Return one line that says whether the gate passed, with the names of failed checks or of warnings."""
    if failed := verdict.failures:
        return f"gate: failed ({', '.join(check.name for check in failed)})"
    warned = [check.name for check in verdict.checks if check.status == "warn"]
    return "gate: passed" + (f", with warnings ({', '.join(warned)})" if warned else "")


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
    return "\n".join([*lines, "", *notes, "", headline(verdict)])


def render_markdown(verdict: Verdict) -> str:
    """Return the verdict as the Markdown comment of a pull request."""
    failed = verdict.failures
    attention = failed + [check for check in verdict.checks if check.status == "warn"]
    return _render(
        "comment.md.j2",
        verdict,
        marker=_markup(MARKER),
        icon=_ICONS[attention[0].status if attention else "pass"],
        icons=_ICONS,
        headline=headline(verdict).capitalize(),
        against=_against(verdict),
        attention=attention,
        most_lines=_MOST_LINES,
        chart=_make_chart(verdict.curve),
        cells=_cells,
    )


def render_junit(verdict: Verdict) -> str:
    """Return the verdict as JUnit XML."""
    return _render("junit.xml.j2", verdict, failures=verdict.failures, sentence=_sentence)


def _render(template: str, verdict: Verdict, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["markdown"] = lambda text: _markup(markdown_text(" ".join(text.split())))
    parts = {
        name: getattr(verdict, name) for name in ("checks", "guards", "metrics", "watched", "differences")
    }
    return _NOT_IN_XML.sub("\ufffd", environment.get_template(template).render(**parts, **values))


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 (escaped by the caller, or a constant)


def _make_chart(curve: Sequence[Point]) -> dict[str, Any] | None:
    """Return the loss curves for Mermaid's xychart, which needs evenly spaced points.

    Returns:
        The values for the template; None if fewer than two steps have both losses.
    """
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


def annotations(verdict: Verdict) -> Iterator[str]:
    """Yield a GitHub workflow command for each failure (an error) and each warning, up to GitHub's limit."""
    for status, command in (("fail", "error"), ("warn", "warning")):
        found = [check for check in verdict.checks if check.status == status]
        for check in found[:_MOST_ANNOTATIONS]:
            # Escape as GitHub's toolkit does (core/src/command.ts).
            title = _escape_data(f"gate: {check.name}").replace(":", "%3A").replace(",", "%2C")
            message = _escape_data(_sentence(check))
            yield f"::{command} file={_ANNOTATED_FILE},title={title}::{message}"


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _against(verdict: Verdict) -> str:
    return f"against {verdict.against}" + (f", accepted because: {verdict.reason}" if verdict.reason else "")


def _sentence(check: Check) -> str:
    """Return the values and the message of a check as one line, for formats without a table."""
    then, now, change, chance, tolerance = _cells(check)[2:]
    parts = [f"{then or 'nothing'} -> {now or 'nothing'}"] if then or now else []
    if change:
        parts.append(f"worse by {change}" + (f" ({chance})" if chance else "") + f", tolerated {tolerance}")
    return "; ".join([*parts, check.says] if check.says else parts)


def _cells(check: Check) -> tuple[str, ...]:
    """Return a check as a row of the table; the columns are those of `_HEADER`."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f} %"

    chance = "" if check.bounds is None else f"{share(check.bounds[0])} to {share(check.bounds[1])}"
    return (
        _WORDS[check.status], check.name, number(check.then), number(check.now), share(check.change),
        chance, share(check.tolerance),
    )  # fmt: skip
