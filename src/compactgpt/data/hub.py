"""Models and files of the Hugging Face hub, in its standard cache, and uploads to it.

What is in the cache is used without a network. Before a download the hub is asked one short question, since
its client tries five times, which takes half a minute, before it reports that there is no network.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from compactgpt.common.errors import BadConfig, BadData, NotAllowed, Unreachable
from compactgpt.common.storage import sha256_file

_TIMEOUT_SECONDS = 5  # for the one short question
# No pickles and no code: what `trust_remote_code=False` and safetensors need.
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
_IN_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)$")  # the folder of a model in the standard cache


def one_line(error: Exception) -> str:
    """Return an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def hub_errors(what: str, advice: str) -> Iterator[None]:
    """Turn the errors of the hub's client into messages about `what`, each with advice for the user.

    Raises:
        BadConfig: the hub does not have the repository or the commit, or does not give it to everyone.
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE forbids to ask.
    """
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadConfig(f"the hub does not have {what}: {advice}") from error
    except (httpx2.HTTPError, OSError, json.JSONDecodeError) as error:  # the last: a hotel's login page
        raise Unreachable(
            f"the hub can't be reached for {what} ({one_line(error)}): check the network, "
            f"run the same command again, or {advice}"
        ) from error


def require_on_hub(kind: Literal["model", "dataset"], repo: str, revision: str, advice: str) -> None:
    """Ask the hub once for a repository `owner/name` at a commit, or a branch; see `hub_errors`."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    with hub_errors(f"{repo} at {revision}", advice):
        ask(repo, revision=revision, timeout=_TIMEOUT_SECONDS)


def fetch_model(repo: str, revision: str, advice: str) -> Path:
    """Return the folder of a model in the hub's standard cache, after downloading what is missing.

    Args:
        repo: `owner/name`.
        revision: a commit, 40 hex digits.
        advice: what the user can do if the model can't be downloaded.

    Raises:
        BadConfig, Unreachable: see `hub_errors`.
        BadData: a file in the cache was altered.
    """
    from huggingface_hub import snapshot_download

    folder = _cached_model(repo, revision)
    if folder is None:
        require_on_hub("model", repo, revision, advice)
        folders = ["*/*"]  # have the weights in other formats
        with hub_errors(repo, advice):
            found = snapshot_download(
                repo, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=folders
            )
        folder = Path(found)
    for path in sorted(folder.glob("*.safetensors")):
        # The cache names a large file by its SHA-256.
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
            raise BadData(f"{path} was altered or damaged: delete {blob} and run the same command again")
    return folder


def _cached_model(repo: str, revision: str) -> Path | None:
    """Return the folder of a model in the cache if it has all files that `from_pretrained` loads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # the missing files may be some that are not needed
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    # Weights in several files have an index: tensor -> file.
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    is_complete = all((folder / name).exists() for name in ["config.json", *weights])
    return folder if is_complete and any(folder.glob("tokenizer*.json")) else None


def fetch_file(repo: str, file: str, revision: str, advice: str) -> Path:
    """Return a file of a data set in the hub's standard cache, after downloading it if it is missing.

    Raises:
        BadConfig, Unreachable: see `hub_errors`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:  # only now is a network needed
        require_on_hub("dataset", repo, revision, advice)
        with hub_errors(f"{repo}/{file}", advice):
            found = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    return Path(found)


# --- upload


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a model in Hugging Face form; create the repository if it is missing.

    Args:
        folder: the model.
        repo: `owner/name`.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        NotAllowed: there is no token, or it does not allow to write there.
        BadConfig: `repo` is not the name of a repository.
        Unreachable: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    login = "run `hf auth login`, or set HF_TOKEN, then run the same command again"
    try:
        with hub_errors(repo, "push to another repository"):
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Upload from compactgpt export"
            )
    except HFValidationError as error:
        raise BadConfig(f"{repo!r} is not a repository name (owner/name): {one_line(error)}") from error
    except Unreachable as error:
        cause = error.__cause__
        if isinstance(cause, LocalTokenNotFoundError):
            raise NotAllowed(f"there is no token for the hub: {login}") from cause
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise NotAllowed(
                f"the hub refused to write to {repo} (HTTP {cause.response.status_code}): {login}"
            ) from cause
        raise
    return str(commit.commit_url)


def with_base_model(card: str, init_from: str) -> str:
    """Add `base_model` to a model card's metadata if the training started from a model in the hub's cache."""
    from huggingface_hub import ModelCard

    for part in Path(init_from).parts:
        if found := _IN_CACHE.match(part):
            parsed = ModelCard(card)
            parsed.data["base_model"] = f"{found[1]}/{found[2]}"
            return str(parsed)
    return card
