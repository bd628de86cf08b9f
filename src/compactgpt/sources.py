"""Other people's texts for tasks: a local file, or a file of the Hugging Face hub; always the one by hash."""

from pathlib import Path

from compactgpt.config import Source
from compactgpt.errors import BadData, MissingInput, Unreachable
from compactgpt.hub import require_on_hub
from compactgpt.storage import sha256_file, write_bytes


def fetch_source(source: Source, state: Path) -> Path:
    """Return the file of a source; a hub's is fetched once and kept under its hash.

    Raises:
        MissingInput: a local file is not there.
        Unreachable: the hub does not give it; said at once where it does not answer.
        BadConfig: it has no such data set or commit.
        BadData: its SHA-256 is another.
    """
    if source.path is not None:
        path = Path(source.path)
        if not path.is_file():
            raise MissingInput(f"{path} is missing: mend its path in evaluation.tasks, or set it to null")
    else:
        path = state / "sources" / source.sha256
        if not path.is_file():
            write_bytes(path, _from_hub(source))
    found = sha256_file(path)
    if found != source.sha256:
        raise BadData(
            f"{path} has SHA-256 {found}, evaluation.tasks expects {source.sha256}: take the file that was "
            "meant, or mend the hash"
        )
    return path


def _from_hub(source: Source) -> bytes:
    import httpx2
    from huggingface_hub import hf_hub_download

    repo, file = str(source.repo), str(source.file)
    where = f"{repo}/{file}"
    require_on_hub("dataset", repo, str(source.revision), "give a local path in evaluation.tasks")
    try:
        cached = hf_hub_download(repo, file, repo_type="dataset", revision=source.revision)
    except (httpx2.HTTPError, OSError) as error:
        raise Unreachable(
            f"the hub does not give {where} ({' '.join(str(error).split())[:200]}): check the network, or "
            "give a local path in evaluation.tasks"
        ) from error
    return Path(cached).read_bytes()
