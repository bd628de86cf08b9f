"""Save a tokenizer in a folder, load it without a network, and encode text.

A tokenizer is a tiktoken encoding. GPT-2's encoding is saved as its two published files, other encodings as
`ranks.tiktoken`, tiktoken's own format. `load_encoder` returns the encoder of a folder: tiktoken is the
reference, and gigatoken returns the same ids 14 times as fast (docs/benchmarks.md).
"""

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tiktoken

from compactgpt.common.errors import BadConfig, BadData, Unreachable
from compactgpt.common.storage import atomic_folder, verified_manifest, write_bytes
from compactgpt.data.token_files import ENCODER_JSON, END_OF_TEXT, VOCAB_BPE

RANKS = "ranks.tiktoken"
# GPT-2's own pattern (openai/gpt-2, src/encoder.py) in the possessive form of tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

CHECK_EVERY_BYTES = 2**20  # bytes of text between two comparisons of gigatoken with tiktoken
CHECK_CHARACTERS = 2**11  # length of the text that is compared
# gigatoken caches every word: 0.3 MB per MB of documentation, 9 MB per MB of random words.
RESTART_EVERY_BYTES = 2**25

Ranks = Mapping[bytes, int]
TokenIds = npt.NDArray[np.uint32]


# --- saving and loading


def save_gpt2(folder: Path, vocab_bpe: bytes, encoder_json: bytes) -> dict[str, Any]:
    """Save GPT-2's two published files as a tokenizer folder, and return the facts in its manifest.

    Raises BadData if a file is damaged, or if the ids in the two files differ.
    """
    ranks = _gpt2_ranks(vocab_bpe, encoder_json)
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    return _save(folder, encoding, {VOCAB_BPE: vocab_bpe, ENCODER_JSON: encoder_json})


def save_named(folder: Path, name: str) -> dict[str, Any]:
    """Download one of tiktoken's encodings, save it as a tokenizer folder, and return its facts.

    Raises BadConfig if tiktoken has no such encoding, Unreachable if tiktoken can't download its files.
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
    return _save(folder, encoding, {RANKS: _format_ranks(encoding._mergeable_ranks)})


def _save(folder: Path, encoding: tiktoken.Encoding, files: Mapping[str, bytes]) -> dict[str, Any]:
    facts = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokenizer_sha256": _sha256(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens),
    }
    with atomic_folder(folder, facts, kind="tokenizer") as temporary:
        for name, content in files.items():
            write_bytes(temporary / name, content)
    return facts


def load_encoding(folder: Path) -> tiktoken.Encoding:
    """Return the encoding of a tokenizer folder. No network is needed.

    Raises MissingInput if the folder does not exist, BadData if a file or the manifest was altered.
    """
    manifest = verified_manifest(folder)
    if RANKS in manifest["files"]:
        lines = (folder / RANKS).read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    else:
        ranks = _gpt2_ranks((folder / VOCAB_BPE).read_bytes(), (folder / ENCODER_JSON).read_bytes())
    facts: list[Any] = [manifest.get(key) for key in ("encoding", "pattern", "special_tokens")]
    name, pattern, special_tokens = facts
    is_same = _sha256(ranks, pattern, special_tokens) == manifest.get("tokenizer_sha256")
    if not is_same or not isinstance(name, str):
        raise BadData(f"{folder} is not the tokenizer that was saved: delete it and run `dvc repro download`")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def _sha256(ranks: Ranks, pattern: Any, special_tokens: Any) -> str:
    """Return the hash of everything that determines the ids. They do not depend on the encoding's name."""
    settings = json.dumps([pattern, special_tokens], sort_keys=True)
    return hashlib.sha256(_format_ranks(ranks) + settings.encode()).hexdigest()


def _format_ranks(ranks: Ranks) -> bytes:
    """Return ranks in tiktoken's format: one line per token, base64 of its bytes, a space, its id."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def unicode_to_bytes() -> dict[str, int]:
    """Return a dict from each character in GPT-2's files to its byte, in the order of the bytes' ids.

    A printable byte is the same character, other bytes are the characters from U+0100 on: the inverse of
    bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


def _gpt2_ranks(vocab_bpe: bytes, encoder_json: bytes) -> dict[bytes, int]:
    """Return tiktoken's ranks from GPT-2's two files: first single bytes, then merges in file order."""
    table = unicode_to_bytes()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(table.values())}
    try:
        for line in vocab_bpe.decode("utf-8").split("\n")[1:-1]:  # the first line is a version
            first, second = line.split()
            ranks[bytes(table[character] for character in first + second)] = len(ranks)
        ids = json.loads(encoder_json)
        end_of_text = ids.pop(END_OF_TEXT, len(ranks))
        published = {bytes(table[character] for character in word): ids[word] for word in ids}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"{VOCAB_BPE} or {ENCODER_JSON} is not a GPT-2 tokenizer file ({error!r})") from error
    if published != ranks or end_of_text != len(ranks):
        raise BadData(f"{VOCAB_BPE} and {ENCODER_JSON} do not agree: they must come from one tokenizer")
    return ranks


# --- encoders


class TiktokenEncoder:
    """The reference encoder: tiktoken, for any encoding."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text; `<|endoftext|>` is encoded as ordinary text. (tokens,)"""
        # Not `encode`: its Python list of ids takes 10 times the memory.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # tiktoken's regular expression fails at a million spaces in a row
            raise BadData(
                f"tiktoken can't encode a document that begins {text[:40]!r} ({error}): remove the document, "
                "or its long runs of white space"
            ) from error


# gigatoken knows the letters and digits of Unicode 17, tiktoken those of Unicode 16. In UTF-8, each character
# that is new in Unicode 17 begins with one of these byte sequences. Some older characters do too (Telugu,
# Kannada, rare scripts). tiktoken encodes all texts with such characters.
_MAY_BE_NEW = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")


class GigatokenEncoder(TiktokenEncoder):
    """The fast encoder: gigatoken, for GPT-2's pattern. Samples of its ids are compared with tiktoken's."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        super().__init__(encoding)
        self._unchecked_bytes = CHECK_EVERY_BYTES  # so that the first text is compared
        self._start()

    def _start(self) -> None:
        """Load a new gigatoken tokenizer, with an empty cache of words."""
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_format_ranks(self.encoding._mergeable_ranks))
            file.flush()
            self._fast: Any = BPETokenizer.from_tiktoken(file.name, "gpt2")
        self._bytes_since_start = 0

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text. (tokens,) Raises BadData if a sample's ids are not tiktoken's."""
        content = text.encode()
        if not text.isascii() and _MAY_BE_NEW.search(content):
            return super().encode(text)
        tokens: TokenIds = self._fast.encode(content)
        self._unchecked_bytes += len(content)
        self._bytes_since_start += len(content)
        if self._unchecked_bytes >= CHECK_EVERY_BYTES:
            self._unchecked_bytes = 0
            sample = text[:CHECK_CHARACTERS]
            if not np.array_equal(self._fast.encode(sample.encode()), super().encode(sample)):
                raise BadData(
                    "gigatoken's ids differ from tiktoken's: set tokenization.encoder to tiktoken in "
                    f"params.yaml, and report the text, which begins {sample[:80]!r}"
                )
        if self._bytes_since_start >= RESTART_EVERY_BYTES:
            self._start()
        return tokens


def load_encoder(folder: Path, choice: Literal["gigatoken", "tiktoken"]) -> TiktokenEncoder:
    """Return the encoder of a tokenizer folder; see `load_encoding` for the errors.

    tiktoken replaces gigatoken if gigatoken is not installed or the pattern is not GPT-2's.
    """
    encoding = load_encoding(folder)
    can_be_fast = encoding._pat_str == GPT2_PATTERN and find_spec("gigatoken") is not None
    return GigatokenEncoder(encoding) if choice == "gigatoken" and can_be_fast else TiktokenEncoder(encoding)
