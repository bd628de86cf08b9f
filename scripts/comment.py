"""Write or update one comment on a pull request: `python scripts/comment.py gate.md`; needs no package.

The first line of the file marks the comment, so that the next run finds it. GitHub sets GITHUB_REPOSITORY and
GITHUB_API_URL, the workflow sets GITHUB_TOKEN and PULL_REQUEST.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 65_536  # of one comment: GitHub refuses more
PAGE = 100


def ask(method: str, path: str, body: dict[str, str] | None = None) -> Any:
    """Call GitHub's REST API."""
    request = urllib.request.Request(
        f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def find(pull_request: str, marker: str) -> int | None:
    """Return the id of our comment, if there is one: the first line of no other comment is the marker."""
    page = 1
    while comments := ask("GET", f"issues/{pull_request}/comments?per_page={PAGE}&page={page}"):
        for comment in comments:
            if comment["body"].startswith(marker) and comment["user"]["type"] == "Bot":
                return int(comment["id"])
        page += 1
    return None


def main() -> None:
    """Write the comment, or update it."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    pull_request, marker = os.environ["PULL_REQUEST"], text.splitlines()[0]
    if len(text) > MOST_CHARACTERS:
        text = (
            text[: MOST_CHARACTERS - 100].rsplit("\n", 1)[0]
            + "\n\n(cut here: the step summary has all of it)\n"
        )
    found = find(pull_request, marker)
    if found is None:
        print(ask("POST", f"issues/{pull_request}/comments", {"body": text})["html_url"])
    else:
        print(ask("PATCH", f"issues/comments/{found}", {"body": text})["html_url"])


if __name__ == "__main__":
    main()
