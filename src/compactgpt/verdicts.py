"""The gate's verdict, told: a table, Markdown for a pull request, JUnit XML, GitHub's annotations."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from compactgpt.regression import Check, Verdict
from compactgpt.storage import write_text

MARKER = "<!-- compactgpt gate -->"  # by which the one comment on a pull request is found again
_ANNOTATED_FILE = "reports/evaluation.json"
_MOST_ANNOTATIONS = 10  # of one kind in one step: GitHub drops the others
_MARKS = {"pass": "pass", "warn": "warn", "fail": "FAIL", "told": ""}
_HEADER = ("", "", "accepted", "now", "worse by", "chance", "tolerance")
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2


def publish(verdict: Verdict, markdown_file: Path | None, junit_file: Path | None) -> None:
    """Write what was asked for; inside GitHub Actions also annotations, and the step's summary."""
    text = markdown(verdict)
    if markdown_file:
        write_text(markdown_file, text)
    if junit_file:
        write_text(junit_file, junit(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stdout.writelines(f"{line}\n" for line in annotations(verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:  # other steps' lines stay
            file.write(text)


def headline(verdict: Verdict) -> str:
    """The verdict in one line."""
    if failed := verdict.failures:
        return f"gate: failed ({', '.join(check.name for check in failed)})"
    warned = [check.name for check in verdict.checks if check.status == "warn"]
    return "gate: passed" + (f", with warnings ({', '.join(warned)})" if warned else "")


def terminal(verdict: Verdict) -> str:
    """A table of plain text."""
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
    """The same for a pull request; its first line is MARKER."""
    lines = [MARKER, f"### {_plain(headline(verdict)).capitalize()}", "", _plain(_against(verdict)), ""]
    if verdict.metrics:
        lines += [*_table(verdict.metrics), ""]
    lines += [
        f"- {_bold(check)} {_plain(check.name)}: {_plain(check.says)}"
        for check in verdict.checks
        if check.says
    ]
    if verdict.watched:
        lines += [
            "",
            "<details><summary>Watched: these cannot fail</summary>",
            "",
            *_table(verdict.watched),
            "",
            "</details>",
        ]
    return "\n".join(lines) + "\n"


def junit(verdict: Verdict) -> str:
    """The same as JUnit XML: a test case a check (Jenkins' junit-10.xsd, which pytest's xunit2 follows)."""
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
    """GitHub's workflow commands, one a line: an error for each failure, a warning for each warning."""
    for status, command in (("fail", "error"), ("warn", "warning")):
        found = [check for check in verdict.checks if check.status == status]
        for check in found[:_MOST_ANNOTATIONS]:
            title = _property(f"gate: {check.name}")
            yield f"::{command} file={_ANNOTATED_FILE},title={title}::{_data(_sentence(check))}"


def _against(verdict: Verdict) -> str:
    return f"against {verdict.against}" + (f", accepted because: {verdict.reason}" if verdict.reason else "")


def _sentence(check: Check) -> str:
    """A check with its numbers, for places without a table."""
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


def _table(checks: list[Check]) -> Iterator[str]:
    yield "| " + " | ".join(_HEADER) + " |"
    yield "| --- | --- |" + " ---: |" * (len(_HEADER) - 2)
    for check in checks:
        _, *cells = _cells(check)
        yield "| " + " | ".join([_bold(check), *map(_plain, cells)]) + " |"


def _bold(check: Check) -> str:
    mark = _MARKS[check.status]
    return f"**{mark}**" if check.status == "fail" else mark


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", " ".join(text.split())).replace("@", "@\u200b")


def _xml(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)


def _data(text: str) -> str:
    """Escape the message of a workflow command, as GitHub's toolkit does (core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
