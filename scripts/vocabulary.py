"""Check that no file has a word of WORDS, the project's old private vocabulary.

A line that quotes one of them ends with `wording: quoted`. Block quotes in Markdown are skipped.
"""

import re
import subprocess
import sys

WORDS = {  # the old word: what to write
    r"doors?": "stage script, entry point",
    r"rooms?": "module",
    r"house rules?": "conventions",
    r"foresight": "forecast",
    r"tellings?": "reporting, callbacks",
    r"gauges?": "system metrics",
    r"shel(?:f|ves)": "registry",
    r"rungs?": "sweep run",
    r"ruler": "evaluation fingerprint",
    r"fates?": "stage status",
    r"speaker": "text generator",
    r"told|tells?": "log, report, print, state",
    r"mend(?:s|ed|ing)?": "repair, correct",
    r"anew": "again",
    r"whoever": "name the actor",
    r"nobody": "no user, no caller",
    r"misfortunes?": "error",
    r"wishes": "options",
    r"go(?:es|ing)? on|went on": "resume, continue",
    r"foretold": "predicted",
    r"thrice": "three times",
    r"own place|broken promise|told clearly": "see the conventions in CONTRIBUTING.md",
}
PATTERN = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(WORDS)})(?![A-Za-z])", re.IGNORECASE)
SKIPPED = re.compile(
    r"(CHANGELOG\.md|claims\.yaml|docs/experiments\.md|scripts/(vocabulary\.py|accepted\.json))$"
    r"|^(reports|results)/|\.(lock|png|svg)$"
)


def main() -> None:
    """Print each word with its file and line; exit with 1 if there is one."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    found = 0
    for name in filter(None, listed.split("\0")):
        if SKIPPED.search(name):
            continue
        with open(name, encoding="utf-8", errors="ignore") as file:
            for number, line in enumerate(file, 1):
                if line.rstrip().endswith("wording: quoted") or line.lstrip().startswith("> "):
                    continue
                spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", line)  # the words of identifiers
                for match in PATTERN.finditer(spaced):
                    found += 1
                    print(f"{name}:{number}: {match[0]!r}")
    sys.exit(f"{found} words of the old vocabulary: see scripts/vocabulary.py" if found else 0)


if __name__ == "__main__":
    main()
