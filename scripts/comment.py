"""One comment on a pull request, renewed in place: `python scripts/comment.py gate.md`, with no package.

The comment is found again by the first line of the file. GITHUB_REPOSITORY and GITHUB_API_URL are set by
GitHub, GITHUB_TOKEN and PULL_REQUEST by the workflow; on a keyboard all four are yours to set.
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
    """The id of our comment, if there is one: another's may quote the marker, but does not begin with it."""
    page = 1
    while comments := ask("GET", f"issues/{pull_request}/comments?per_page={PAGE}&page={page}"):
        for comment in comments:
            if comment["body"].startswith(marker) and comment["user"]["type"] == "Bot":
                return int(comment["id"])
        page += 1
    return None


def main() -> None:
    """Write the comment, or renew it."""
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
