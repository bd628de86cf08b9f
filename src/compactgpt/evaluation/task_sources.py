"""Texts of others for tasks: a local file, or a file of the Hugging Face hub, checked by its hash."""

from pathlib import Path

from compactgpt.common.errors import BadData, MissingInput
from compactgpt.common.storage import sha256_file
from compactgpt.config import Source
from compactgpt.data.hub import fetch_file


def fetch_source(source: Source) -> Path:
    """Return the file of a source: a local one, or one in the hub's standard cache, fetched if it is missing.

    Raises:
        MissingInput: a local file is not there.
        Unreachable: it is not in the cache, and the hub does not answer; said at once.
        BadConfig: it has no such data set or commit.
        BadData: its SHA-256 is another.
    """
    if source.path is not None:
        path = Path(source.path)
        if not path.is_file():
            raise MissingInput(f"{path} is missing: correct its path in evaluation.tasks, or set it to null")
    else:
        advice = "give a local path in evaluation.tasks"
        path = fetch_file(str(source.repo), str(source.file), str(source.revision), advice)
    found = sha256_file(path)
    if found != source.sha256:
        raise BadData(
            f"{path} has SHA-256 {found}, evaluation.tasks expects {source.sha256}: take the file that was "
            "meant, or correct the hash"
        )
    return path
