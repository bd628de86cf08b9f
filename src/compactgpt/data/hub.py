"""Download models and files from the Hugging Face hub, and upload models.

A file that is already in the local cache of huggingface_hub is read without a network.
Several functions take `advice`: a text for error messages that says what the user can do.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from compactgpt.common.errors import BadConfig, BadData, MissingInput, Unreachable
from compactgpt.common.storage import read_json, sha256_file
from compactgpt.config import Folder, Hub, HubCorpus, Params

# If this report exists, the stage `download` has finished and does not need the hub.
DOWNLOADED = Path("reports/download.json")
_TIMEOUT_SECONDS = 5  # time limit of the request that checks the hub before a download
# The files that `from_pretrained` needs. These formats contain no pickles and no code.
MODEL_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
# Arguments of `snapshot_download`. Subfolders are ignored, since they contain weights in other formats.
_WANTED: dict[str, Any] = {"allow_patterns": MODEL_FILES, "ignore_patterns": ["*/*"]}


def one_line(error: Exception) -> str:
    """Return an error's message on one line. If the message is empty, return the error's type."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def hub_errors(what: str, advice: str) -> Iterator[None]:
    """Convert errors of huggingface_hub into user errors that name `what` and give `advice`.

    Raises BadConfig if the repository's name is not valid, or if the repository or the commit does not exist.
    Raises Unreachable if the hub does not answer or denies access.
    """
    import httpx2
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise BadConfig(f"{what!r} is not a repository name (owner/name): {one_line(error)}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadConfig(f"the hub does not have {what}: {advice}") from error
    except (httpx2.HTTPError, OSError, json.JSONDecodeError) as error:
        # JSONDecodeError is raised if the network returns a login page (HTML) instead of the hub's answer.
        raise Unreachable(
            f"the hub can't be reached for {what} ({one_line(error)}): check the network and your access "
            f"(`hf auth login`, or HF_TOKEN), or {advice}"
        ) from error


def require_on_hub(kind: Literal["model", "dataset"], repo: str, revision: str, advice: str) -> None:
    """Check that the hub has the repository `repo` (owner/name), with the commit or branch `revision`.

    Raises BadConfig if the repository or `revision` is missing, Unreachable if the hub does not answer.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"{repo} at {revision}", advice):
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)


def fetch_model(repo: str, revision: str, advice: str) -> Path:
    """Return a model's folder in the local cache. If files are missing there, first download the model.

    Raises BadData if a weights file is damaged, BadConfig if the hub lacks the model, and Unreachable if
    the hub does not answer.
    """
    from huggingface_hub import snapshot_download

    folder = cached_model(repo, revision)
    if folder is None:
        require_on_hub("model", repo, revision, advice)
        with hub_errors(repo, advice):
            folder = Path(snapshot_download(repo, revision=revision, **_WANTED))
    for path in sorted(folder.glob("*.safetensors")):
        # `path` is a link to a file in the cache. The name of this file is the SHA-256 of its content.
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
            raise BadData(f"{path} was altered or damaged: delete {blob} and run the same command again")
    return folder


def cached_model(repo: str, revision: str) -> Path | None:
    """Return a model's folder in the local cache, or None if a file of the model is missing there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **_WANTED))
    except LocalEntryNotFoundError:
        return None
    # Check that each kind of file is there: `snapshot_download` also returns folders with missing files.
    needed = ("config.json", "*.safetensors", "tokenizer*.json")
    return folder if all(any(folder.glob(pattern)) for pattern in needed) else None


def check_model_folder(name: str, spec: Folder) -> None:
    """Check that the model folder of the baseline `name` has the hash given in params.yaml.

    Raises MissingInput if the folder is missing, and BadConfig if the folder has another hash.
    """
    folder = Path(spec.path)
    if not folder.is_dir():
        raise MissingInput(f"{spec.path} is not a folder: correct baseline.specs.{name}.path")
    # A tokenizer is in .json and .txt files, or in a .model file (SentencePiece, tiktoken).
    patterns = ("*.safetensors", "*.json", "*.txt", "*.model")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    hashes = [f"{path.name} {sha256_file(path)}" for path in files]
    found = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if found != spec.sha256:
        raise BadConfig(
            f"baseline.specs.{name}.sha256 is {spec.sha256 or 'empty'}, but the hash of the files in "
            f"{folder} is {found}. If these are the right files, write this hash into params.yaml, or add "
            f"-S 'baseline.specs.{name}={{kind: folder, path: {folder}, sha256: {found}}}' to the command"
        )


def fetch_file(repo: str, file: str, revision: str, advice: str) -> Path:
    """Return the path of a data set's file in the local cache. If the file is missing, first download it.

    Raises BadConfig if the hub lacks the data set, and Unreachable if the hub does not answer.
    """
    from huggingface_hub import hf_hub_download

    if found := _cached_file(repo, file, revision):
        return found
    require_on_hub("dataset", repo, revision, advice)
    with hub_errors(f"{repo}/{file}", advice):
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))


def _cached_file(repo: str, file: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, repo_type="dataset", revision=revision)
    return Path(found) if isinstance(found, str) else None


def local_copy(params: HubCorpus) -> Path | None:
    """Return the path of the local copy, a folder or a text file, that replaces the hub's data set.

    Returns None without a local copy. Raises MissingInput if the folder `download.hub.mirror` does not exist.
    """
    if params.mirror is not None:
        if not Path(params.mirror).is_dir():
            raise MissingInput(f"download.hub.mirror: there is no folder {params.mirror}")
        return Path(params.mirror)
    file = params.sets[params.name].file
    return Path(file) if file is not None and Path(file).is_file() else None


def check_data_set(params: HubCorpus) -> None:
    """Check that the data set `params.name` has a local copy or is on the hub.

    Raises BadConfig if params.yaml gives no commit or the hub lacks this commit. Raises MissingInput if the
    folder `download.hub.mirror` does not exist, and Unreachable if the hub does not answer.
    """
    chosen, key = params.sets[params.name], f"download.hub.sets.{params.name}"
    if local_copy(params) is not None:
        return
    if chosen.revision is None:
        raise BadConfig(
            f"{key}.revision is empty: write a commit there (40 hex digits), as shown by "
            f"`git ls-remote https://huggingface.co/datasets/{chosen.repo}`"
        )
    advice = f"correct {key}, or set download.hub.mirror to a local copy of the data set"
    if chosen.file is not None:
        get, copy = f"curl -fLo {chosen.file} {chosen.file_url}", f"cp YOUR_COPY {chosen.file}"
        advice = f"get the text file: run `{get}` (with a network), or `{copy}` (if you have the file)"
    require_on_hub("dataset", chosen.repo, chosen.revision, advice)


def check_sources(params: Params) -> None:
    """Check that the baseline models, task files and corpus of params.yaml are local or on the hub.

    Raises MissingInput if a local file is missing, BadConfig if a model folder has a wrong hash or the hub
    lacks a commit, and Unreachable if the hub does not answer.
    """
    # Each value is a repository that the hub must have: (kind of repository, owner/name, commit). The key is
    # the setting for `dvc exp run -S` with which a user replaces this repository by a local copy.
    needed: dict[str, tuple[Literal["model", "dataset"], str, str]] = {}
    for name in params.baseline.names:
        spec = params.baseline.specs[name]
        if isinstance(spec, Folder):
            check_model_folder(name, spec)
        elif isinstance(spec, Hub) and cached_model(spec.repo, spec.revision) is None:
            setting = f"baseline.specs.{name}={{kind: folder, path: FOLDER}}"
            needed[setting] = ("model", spec.repo, spec.revision)
    tasks = params.evaluation.tasks
    sources = {"lambada": tasks.lambada, "lambada_original": tasks.lambada_original}
    sources |= {f"wikitext.{name}": source for name, source in tasks.wikitext.items()}
    for name, source in sources.items():
        if source is None:
            continue
        key, path = f"evaluation.tasks.{name}", source.path
        if path is not None and not Path(path).is_file():
            raise MissingInput(f"{path} is not a file: correct {key}.path")
        if path is None and not _cached_file(str(source.repo), str(source.file), str(source.revision)):
            setting = f"{key}={{path: FILE, sha256: {source.sha256}}}"
            needed[setting] = ("dataset", str(source.repo), str(source.revision))
    advice = " ".join(f"-S '{setting}'" for setting in needed)
    for kind, repo, revision in needed.values():
        require_on_hub(kind, repo, revision, f"give local copies: {advice}")
    is_downloaded = DOWNLOADED.exists() and read_json(DOWNLOADED)["corpus"] == "hub"
    if params.download.corpus == "hub" and not is_downloaded:
        check_data_set(params.download.hub)


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a model folder in Hugging Face format, and return the URL of the uploaded commit.

    If the repository `repo` is missing, the hub creates it: as a private repository if `private` is true,
    else as a public one. Raises BadConfig if the name `repo` is not valid, and Unreachable if the hub does
    not answer or denies access.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repo, "push to another repository"):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from compactgpt export"
        )
    return str(commit.commit_url)
