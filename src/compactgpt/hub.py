"""Is the Hugging Face hub there, and does it have this repository at this commit? Answered at once.

The hub's own clients try five times, which takes half a minute, before they say that there is no network.
"""

import json
from typing import Literal

from compactgpt.errors import BadConfig, Unreachable

_TIMEOUT_SECONDS = 5


def require_on_hub(kind: Literal["model", "dataset"], repo: str, revision: str, mend: str) -> None:
    """Ask the hub once for a repository at a commit.

    Args:
        kind: what the repository holds.
        repo: its name, `owner/name`.
        revision: a commit, 40 hex digits.
        mend: what the user can do, for the message.

    Raises:
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE forbids to ask.
        BadConfig: it has no such repository or commit, or does not give it to everyone.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(repo, revision=revision, timeout=_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadConfig(f"the hub gives no {repo} at {revision}: {mend}") from error
    except (httpx2.HTTPError, OSError, json.JSONDecodeError) as error:  # the last: a hotel's page, say
        raise Unreachable(
            f"the hub can't be reached for {repo} ({one_line(error)}): check the network, or {mend}"
        ) from error


def one_line(error: Exception) -> str:
    """An error's message on one line, or its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
