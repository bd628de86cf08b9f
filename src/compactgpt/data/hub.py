"""Download models and files from the Hugging Face hub, and upload models.

Files in the hub's standard cache are used without a network. Before a download, one request with a short
timeout checks that the hub answers. Without this check, the hub's client would try five times, for half a
minute, before it reports that there is no network.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from compactgpt.common.errors import BadConfig, BadData, MissingInput, NotAllowed, Unreachable
from compactgpt.common.storage import read_json, sha256_file
from compactgpt.config import Download, Folder, Hub, Params

DOWNLOADED = Path("reports/download.json")  # DVC deletes this report before the stage `download` starts
_TIMEOUT_SECONDS = 5  # of the request before a download
# The files that `from_pretrained` needs with safetensors weights. They contain no pickles and no code.
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
_IN_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)$")  # the folder of a model in the standard cache


def one_line(error: Exception) -> str:
    """Return an error's message on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def hub_errors(what: str, advice: str) -> Iterator[None]:
    """Convert errors of the hub's client into user errors.

    Args:
        what: the repository or file that was requested, for the message.
        advice: what the user can do, for the message.

    Raises:
        BadConfig: the repository or the commit does not exist, or is not public.
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE forbids requests.
    """
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadConfig(f"the hub does not have {what}: {advice}") from error
    except (httpx2.HTTPError, OSError, json.JSONDecodeError) as error:  # JSONDecodeError: a login page
        raise Unreachable(
            f"the hub can't be reached for {what} ({one_line(error)}): check the network, "
            f"run the same command again, or {advice}"
        ) from error


def require_on_hub(kind: Literal["model", "dataset"], repo: str, revision: str, advice: str) -> None:
    """Check that the hub has the repository `owner/name` at a commit or branch; see `hub_errors`."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    with hub_errors(f"{repo} at {revision}", advice):
        ask(repo, revision=revision, timeout=_TIMEOUT_SECONDS)


def fetch_model(repo: str, revision: str, advice: str) -> Path:
    """Return the folder of a model in the hub's standard cache; download the model if it is incomplete.

    Args:
        repo: `owner/name`.
        revision: a commit, 40 hex digits.
        advice: what the user can do if the model can't be downloaded.

    Raises:
        BadConfig: the hub does not have the model, or the model is not public.
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE forbids requests.
        BadData: a weights file in the cache was altered or damaged.
    """
    from huggingface_hub import snapshot_download

    folder = cached_model(repo, revision)
    if folder is None:
        require_on_hub("model", repo, revision, advice)
        folders = ["*/*"]  # subfolders contain weights in other formats
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


def cached_model(repo: str, revision: str) -> Path | None:
    """Return a model's folder in the cache, or None if a file that `from_pretrained` loads is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # perhaps only files that are not needed
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    # Weights in several files have an index that maps each tensor to its file.
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    is_complete = all((folder / name).exists() for name in ["config.json", *weights])
    return folder if is_complete and any(folder.glob("tokenizer*.json")) else None


def check_model_folder(name: str, spec: Folder) -> None:
    """Check that the files of the folder baseline `name` have the hash that params.yaml states.

    Raises:
        MissingInput: the folder does not exist.
        BadConfig: params.yaml has no hash, or another one.
    """
    folder = Path(spec.path)
    if not folder.is_dir():
        raise MissingInput(f"{spec.path} is not a folder: correct baseline.specs.{name}.path")
    files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.txt")))
    hashes = [f"{path.name} {sha256_file(path)}" for path in files]
    found = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if found != spec.sha256:
        raise BadConfig(
            f"baseline.specs.{name}.sha256: found {spec.sha256 or 'nothing'}, but {folder} holds "
            f"{found}: write that into params.yaml if these are the weights you mean, or give it with "
            f"-S 'baseline.specs.{name}={{kind: folder, path: {folder}, sha256: {found}}}'"
        )


def check_sources(params: Params) -> None:
    """Check, before a run, that models, task files and corpus of params.yaml are here or on the hub.

    Raises:
        MissingInput: a local folder or file does not exist.
        BadConfig: the hub does not have a model or file; or the files of a folder have another hash.
        Unreachable: the hub does not answer. The message lists the settings for local copies.
    """
    needed: list[tuple[Literal["model", "dataset"], str, str]] = []
    advice = []
    for name in params.baseline.names:
        spec = params.baseline.specs[name]
        if isinstance(spec, Folder):
            check_model_folder(name, spec)
        elif isinstance(spec, Hub) and cached_model(spec.repo, spec.revision) is None:
            needed.append(("model", spec.repo, spec.revision))
            advice.append(f"-S 'baseline.specs.{name}={{kind: folder, path: FOLDER}}'")
    tasks = params.evaluation.tasks
    sources = {"lambada": tasks.lambada, "lambada_original": tasks.lambada_original}
    sources |= {f"wikitext.{name}": source for name, source in tasks.wikitext.items()}
    for name, source in sources.items():
        if source is None:
            continue
        key = f"evaluation.tasks.{name}"
        if source.path is not None:
            if not Path(source.path).is_file():
                raise MissingInput(f"{source.path} is not a file: correct {key}.path")
        elif _cached_file(str(source.repo), str(source.file), str(source.revision)) is None:
            needed.append(("dataset", str(source.repo), str(source.revision)))
            advice.append(f"-S '{key}={{path: FILE, sha256: {source.sha256}}}'")
    for kind, repo, revision in needed:
        require_on_hub(kind, repo, revision, f"give local copies: {' '.join(advice)}")
    _check_corpus(params.download)


def _check_corpus(download: Download) -> None:
    """Check that the hub has the corpus, unless a copy is here or the stage `download` has read the hub."""
    chosen = download.hub.sets[download.hub.name]
    has_copy = download.hub.mirror is not None or (chosen.file is not None and os.path.lexists(chosen.file))
    is_downloaded = DOWNLOADED.exists() and read_json(DOWNLOADED)["corpus"] == "hub"
    if download.corpus != "hub" or chosen.revision is None or has_copy or is_downloaded:
        return
    advice = "name a copy of the repository in download.hub.mirror"
    if chosen.file is not None:
        advice = f"bring the text: curl -fLo {chosen.file} {chosen.file_url}"
    require_on_hub("dataset", chosen.repo, chosen.revision, advice)


def _cached_file(repo: str, file: str, revision: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(found)


def fetch_file(repo: str, file: str, revision: str, advice: str) -> Path:
    """Return the path of a data set's file in the hub's standard cache; download the file if needed.

    Raises:
        BadConfig: the hub does not have the data set, or the data set is not public.
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE forbids requests.
    """
    from huggingface_hub import hf_hub_download

    found = _cached_file(repo, file, revision)
    if found is None:
        require_on_hub("dataset", repo, revision, advice)
        with hub_errors(f"{repo}/{file}", advice):
            found = Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    return found


# --- upload


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a model to the hub; create the repository if it does not exist.

    Args:
        folder: folder of the model, in Hugging Face format.
        repo: `owner/name`.
        private: whether to create a new repository as private.

    Returns:
        The URL of the commit.

    Raises:
        NotAllowed: there is no token, or the token does not allow writing to `repo`.
        BadConfig: `repo` is not a valid repository name.
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
    """Return a model card; `base_model` is added if training started from a model in the hub's cache."""
    from huggingface_hub import ModelCard

    for part in Path(init_from).parts:
        if found := _IN_CACHE.match(part):
            parsed = ModelCard(card)
            parsed.data["base_model"] = f"{found[1]}/{found[2]}"
            return str(parsed)
    return card
