"""Renew what docs/tutorial.md shows of commands.

`python scripts/update_tutorial.py`, after a run of the pipeline: each block of `$ compactgpt ...` is
run; a line that it shows is replaced by the line of the same words that the command says now. Leaves with 1,
and names them, if there are lines without one.
"""

import re
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path("docs/tutorial.md")


def words_of(line: str) -> str:
    """A line without its figures and spaces."""
    return re.sub(r"[-\d.,%]+|\s+", " ", line).strip()


def renewed(block: re.Match[str], lost: list[str]) -> str:
    """A block with the lines that its command says now."""
    command, shown = block[1], block[2]
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    said: dict[str, str] = {}
    for line in done.stdout.splitlines():
        said.setdefault(words_of(line), line)
    lines = []
    for line in shown.splitlines():
        new = line if line == "..." else said.get(words_of(line))
        if new is None:
            lost.append(f"{command}: {line}")
        lines.append(line if new is None else new)
    return "\n".join([f"```\n$ {command}", *lines, "```"])


def main() -> None:
    """Rewrite the tutorial."""
    lost: list[str] = []
    # verify is shown with a number that was altered by hand
    block = re.compile(r"```\n\$ (compactgpt (?!verify)[^\n]*)\n(.*?)\n```", re.DOTALL)
    TUTORIAL.write_text(block.sub(lambda found: renewed(found, lost), TUTORIAL.read_text()))
    if lost:
        sys.exit("\n".join(["not said any more; mend by hand:", *lost]))


if __name__ == "__main__":
    main()
