"""A tiktoken encoding in a folder of ours: saved once by `download`, loaded everywhere without network.

GPT-2's is kept as its two published files, `vocab.bpe` (the merges) and `encoder.json` (the ids); any
other as `ranks.tiktoken` (tiktoken's own format: base64 of a token's bytes, a space, its id). The
manifest carries what the files do not: the name, the pattern that cuts text into words, the special
tokens, and a hash of all that decides the ids.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken

from compactgpt.common.errors import BadConfig, BadData, Unreachable
from compactgpt.common.storage import atomic_folder, verified_manifest, write_bytes

VOCAB_BPE = "vocab.bpe"
ENCODER_JSON = "encoder.json"
RANKS = "ranks.tiktoken"
END_OF_TEXT = "<|endoftext|>"
# GPT-2's own pattern (openai/gpt-2, src/encoder.py) in the possessive form of tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

Ranks = Mapping[bytes, int]


def save_gpt2(folder: Path, vocab_bpe: bytes, encoder_json: bytes) -> dict[str, Any]:
    """Write GPT-2's two files as an encoding folder.

    Returns:
        The facts of its manifest.

    Raises:
        BadData: the two files are damaged or do not agree.
    """
    ranks = _gpt2_ranks(vocab_bpe, encoder_json)
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    return _save(folder, encoding, {VOCAB_BPE: vocab_bpe, ENCODER_JSON: encoder_json})


def save_named(folder: Path, name: str) -> dict[str, Any]:
    """Fetch one of tiktoken's encodings its own way, and write it as an encoding folder.

    Raises:
        BadConfig: tiktoken has no such encoding, or it has no end-of-text token.
        Unreachable: its files can't be fetched.
    """
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise BadConfig(f"download.tokenizer.encoding: found {name!r}; allowed: {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"tiktoken can't fetch the encoding {name} ({type(error).__name__}): check the network, "
            "set TIKTOKEN_CACHE_DIR to a folder that has its files, or use gpt2"
        ) from error
    if END_OF_TEXT not in encoding._special_tokens:
        raise BadConfig(f"download.tokenizer.encoding: {name} has no {END_OF_TEXT}, which closes documents")
    return _save(folder, encoding, {RANKS: _ranks_bytes(encoding._mergeable_ranks)})


def _save(folder: Path, encoding: tiktoken.Encoding, files: Mapping[str, bytes]) -> dict[str, Any]:
    facts = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokenizer_sha256": encoding_sha256(encoding),
    }
    with atomic_folder(folder, facts, kind="tokenizer") as temporary:
        for name, content in files.items():
            write_bytes(temporary / name, content)
    return facts


def load_encoding(folder: Path) -> tiktoken.Encoding:
    """Build the encoding of a folder, offline, after checking its files.

    Raises:
        MissingInput: there is no such folder.
        BadData: a file was altered or cut short, or the encoding is not the one that was saved.
    """
    manifest = verified_manifest(folder)
    if RANKS in manifest["files"]:
        ranks = _parse_ranks((folder / RANKS).read_bytes())
    else:
        ranks = _gpt2_ranks((folder / VOCAB_BPE).read_bytes(), (folder / ENCODER_JSON).read_bytes())
    facts: list[Any] = [manifest.get(key) for key in ("encoding", "pattern", "special_tokens")]
    name, pattern, special = facts
    if _sha256(ranks, pattern, special) != manifest.get("tokenizer_sha256") or not isinstance(name, str):
        raise BadData(f"{folder} is not the tokenizer that was saved: delete it and run `dvc repro download`")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encoding_sha256(encoding: tiktoken.Encoding) -> str:
    """Hash all that decides the ids: tokens with their ranks, pattern, special tokens."""
    return _sha256(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)


def _sha256(ranks: Ranks, pattern: Any, special_tokens: Any) -> str:
    rest = json.dumps([pattern, special_tokens], sort_keys=True)
    return hashlib.sha256(_ranks_bytes(ranks) + rest.encode()).hexdigest()


def _ranks_bytes(ranks: Ranks) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def spelled_bytes() -> dict[str, int]:
    """Which character of GPT-2's files spells which byte, in the order of their ids.

    Bytes that print stand for themselves; the others get the characters from U+0100 on
    (openai/gpt-2, src/encoder.py, bytes_to_unicode).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    spelled.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return spelled


def _gpt2_ranks(vocab_bpe: bytes, encoder_json: bytes) -> dict[bytes, int]:
    """Turn GPT-2's two files into tiktoken's ranks: single bytes first, then merges in their order."""
    spelled = spelled_bytes()

    def read(word: str) -> bytes:
        return bytes(spelled[character] for character in word)

    ranks = {bytes([byte]): rank for rank, byte in enumerate(spelled.values())}
    try:
        for line in vocab_bpe.decode("utf-8").split("\n")[1:-1]:  # the first line is a version
            first, second = line.split()
            ranks[read(first) + read(second)] = len(ranks)
        ids = json.loads(encoder_json)
        end_of_text = ids.pop(END_OF_TEXT, len(ranks))
        agree = {read(word): rank for word, rank in ids.items()} == ranks and end_of_text == len(ranks)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"{VOCAB_BPE} or {ENCODER_JSON} is no GPT-2 tokenizer file ({error!r})") from error
    if not agree:
        raise BadData(f"{VOCAB_BPE} and {ENCODER_JSON} do not agree: they must come from one tokenizer")
    return ranks
