"""The Hugging Face hub: models and files through its standard cache, local files first; and uploads.

What is in the cache already is used without a network, also with HF_HUB_OFFLINE=1. Only for what is missing
is the hub asked, and first by one short question: its clients try five times, which takes half a minute,
before they say that there is no network.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from compactgpt.common.errors import BadConfig, BadData, NotAllowed, Unreachable
from compactgpt.common.storage import sha256_file

_TIMEOUT_SECONDS = 5
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
_IN_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)$")  # the folder of a model in the standard cache


def fetch_model(repo: str, revision: str, advice: str) -> Path:
    """Return the folder of a model in the hub's standard cache; download what is missing.

    Args:
        repo: `owner/name`.
        revision: a commit, 40 hex digits.
        advice: what the user can do if it can't be fetched, for the message.

    Raises:
        Unreachable: it is not in the cache, and the hub does not answer; said at once.
        BadConfig: the hub has no such model or commit, or does not give it to everyone.
        BadData: a file in the cache was altered.
    """
    from huggingface_hub import snapshot_download

    folder = _cached_model(repo, revision)
    if folder is None:
        require_on_hub("model", repo, revision, advice)
        with _reached(repo, advice):
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=["*/*"]
                )
            )
    for path in sorted(folder.glob("*.safetensors")):
        _check_blob(path)
    return folder


def _cached_model(repo: str, revision: str) -> Path | None:
    """Return a model's folder in the cache if it has all files that `from_pretrained` loads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (
        IncompleteSnapshotError
    ) as error:  # it lacks files of the repository, but perhaps none that we need
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    if not all(any(folder.glob(pattern)) for pattern in ("config.json", "tokenizer*.json")):
        return None
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return folder if all((folder / name).exists() for name in shards) else None


def _check_blob(path: Path) -> None:
    """Compare a large file of the cache with its hash: the cache names a large file by its SHA-256."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
        raise BadData(f"{path} was altered or damaged: delete {blob} and run the same command again")


def fetch_file(repo: str, file: str, revision: str, advice: str) -> Path:
    """Return a file of a data set in the hub's standard cache; download it if it is missing.

    Raises:
        Unreachable, BadConfig: as `fetch_model`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        require_on_hub("dataset", repo, revision, advice)
        with _reached(f"{repo}/{file}", advice):
            found = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    return Path(found)


@contextmanager
def _reached(what: str, advice: str) -> Iterator[None]:
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError) as error:
        raise Unreachable(
            f"the hub stopped answering for {what} ({one_line(error)}): run it again, or {advice}"
        ) from error


def require_on_hub(kind: Literal["model", "dataset"], repo: str, revision: str, advice: str) -> None:
    """Ask the hub once for a repository at a commit.

    Args:
        kind: what the repository holds.
        repo: its name, `owner/name`.
        revision: a commit, 40 hex digits.
        advice: what the user can do, for the message.

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
        raise BadConfig(f"the hub gives no {repo} at {revision}: {advice}") from error
    except (httpx2.HTTPError, OSError, json.JSONDecodeError) as error:  # the last: a hotel's page, say
        raise Unreachable(
            f"the hub can't be reached for {repo} ({one_line(error)}): check the network, or {advice}"
        ) from error


def one_line(error: Exception) -> str:
    """Return an error's message on one line, or its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- upload


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as a model of the hub, as `push_to_hub` does; create the repository if it is missing.

    Args:
        folder: a model in Hugging Face form.
        repo: `owner/name`.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        NotAllowed: no token, or none that may write there.
        BadConfig: `repo` is not a name of a repository.
        Unreachable: the hub does not answer.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from compactgpt export"
        )
    except HFValidationError as error:
        raise BadConfig(f"{repo!r} is not a repository name (owner/name): {one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise NotAllowed(
            f"no token for the hub: run `hf auth login`, or set HF_TOKEN, then push {repo}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise NotAllowed(
                f"the hub refused to write to {repo} (HTTP {status}): run `hf auth login` with another token"
            ) from error
        raise Unreachable(
            f"the hub refused {repo} ({one_line(error)}): run the same command again"
        ) from error
    except (httpx2.HTTPError, OSError) as error:
        raise Unreachable(
            f"the hub can't be reached for {repo} ({one_line(error)}): check the network, run it again"
        ) from error
    return str(commit.commit_url)


def base_model(init_from: str) -> str:
    """Return the hub's name of the model that a training started from, if it is in the standard cache."""
    for part in Path(init_from).parts:
        if found := _IN_CACHE.match(part):
            return f"{found[1]}/{found[2]}"
    return ""


def with_base_model(card: str, init_from: str) -> str:
    """Add `base_model` to a model card's metadata, if the training started from a model of the hub."""
    from huggingface_hub import ModelCard

    if not (name := base_model(init_from)):
        return card
    parsed = ModelCard(card)
    parsed.data["base_model"] = name
    return str(parsed)
