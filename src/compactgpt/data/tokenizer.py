"""Save a tokenizer in a folder, load a saved tokenizer without a network, and encode text.

A tokenizer is an encoding of the library tiktoken. GPT-2's tokenizer is saved as OpenAI's two published
files. Every other tokenizer is saved as the file `ranks.tiktoken` in tiktoken's format. Text is encoded by
tiktoken, or by the library gigatoken, which returns equal token ids 14 times as fast (docs/benchmarks.md).
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
# The regular expression that cuts text into words for GPT-2, copied from tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

CHECK_EVERY_BYTES = 2**20  # gigatoken's ids are compared with tiktoken's after each MiB of text
CHECK_CHARACTERS = 2**11  # number of characters that are compared
# gigatoken keeps every word in memory: 0.3 MB per MB of documentation, 9 MB per MB of random words.
# So gigatoken is loaded again, with empty memory, after this many bytes of text.
RESTART_EVERY_BYTES = 2**25

Ranks = Mapping[bytes, int]
TokenIds = npt.NDArray[np.uint32]


# --- saving and loading


def save_gpt2(folder: Path, vocab_bpe: bytes, encoder_json: bytes) -> dict[str, Any]:
    """Save GPT-2's two published files in a tokenizer folder, and return the facts in the folder's manifest.

    Raises BadData if a file is damaged, or if the token ids in the two files differ.
    """
    ranks = _gpt2_ranks(vocab_bpe, encoder_json)
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    return _save(folder, encoding, {VOCAB_BPE: vocab_bpe, ENCODER_JSON: encoder_json})


def save_named(folder: Path, name: str) -> dict[str, Any]:
    """Download the tiktoken encoding `name`, save it in a tokenizer folder, and return the manifest's facts.

    Raises BadConfig if tiktoken has no encoding with this name or the encoding has no end-of-text token,
    Unreachable if tiktoken can't download the files of the encoding.
    """
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise BadConfig(f"download.tokenizer.encoding: found {name!r}; allowed: {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"tiktoken can't fetch the encoding {name} ({type(error).__name__}): check the network, "
            "set TIKTOKEN_CACHE_DIR to a folder that contains the encoding, "
            "or set download.tokenizer.encoding to gpt2"
        ) from error
    if END_OF_TEXT not in encoding._special_tokens:
        raise BadConfig(
            f"download.tokenizer.encoding: the encoding {name} has no token {END_OF_TEXT}, which must end "
            "each document: choose gpt2 or another encoding that has this token"
        )
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
    """Return the tiktoken encoding that is saved in a tokenizer folder, without using the network.

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
        raise BadData(
            f"the tokenizer in {folder} was altered: delete the folder, and run `dvc repro download`"
        )
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def _sha256(ranks: Ranks, pattern: Any, special_tokens: Any) -> str:
    """Return a hash of everything that determines the token ids. The encoding's name is not included."""
    settings = json.dumps([pattern, special_tokens], sort_keys=True)
    return hashlib.sha256(_format_ranks(ranks) + settings.encode()).hexdigest()


def _format_ranks(ranks: Ranks) -> bytes:
    """Return the content of a `.tiktoken` file: one line per token: its bytes in base64, a space, its id."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def unicode_to_bytes() -> dict[str, int]:
    """Return the byte that each character in GPT-2's published files stands for, in the order of token ids.

    GPT-2's files write a printable byte as the character with this code, and each other byte as a character
    from U+0100 on. This table is the inverse of bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


def _gpt2_ranks(vocab_bpe: bytes, encoder_json: bytes) -> dict[bytes, int]:
    """Read GPT-2's two files, and return the id of each token: first the single bytes, then the merges."""
    table = unicode_to_bytes()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(table.values())}
    try:
        for line in vocab_bpe.decode("utf-8").split("\n")[1:-1]:  # the first line is the file version
            first, second = line.split()
            ranks[bytes(table[character] for character in first + second)] = len(ranks)
        ids = json.loads(encoder_json)
        end_of_text = ids.pop(END_OF_TEXT, len(ranks))
        published = {bytes(table[character] for character in word): ids[word] for word in ids}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(
            f"{VOCAB_BPE} or {ENCODER_JSON} is not a GPT-2 tokenizer file ({error!r}): "
            "download the two files again"
        ) from error
    if published != ranks or end_of_text != len(ranks):
        raise BadData(
            f"{VOCAB_BPE} and {ENCODER_JSON} do not agree on the token ids: use two files of one tokenizer"
        )
    return ranks


# --- encoders


class TiktokenEncoder:
    """An encoder that uses tiktoken. It works for every encoding."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text, shape (tokens,). `<|endoftext|>` is encoded as ordinary text."""
        # `encode` returns a Python list, which takes 10 times the memory of this array.
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # such as for a million spaces in a row
            raise BadData(
                f"tiktoken can't encode a document that begins {text[:40]!r} ({error}): remove the document, "
                "or remove its long white space"
            ) from error


# gigatoken knows the letters and digits of Unicode 17, but tiktoken knows only Unicode 16.
# In UTF-8, every character that is new in Unicode 17 begins with bytes that match this expression.
# A text with a match is encoded by tiktoken. Some older characters match too (Telugu, Kannada, rare scripts).
_MAY_BE_NEW = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")


class GigatokenEncoder(TiktokenEncoder):
    """A fast encoder that uses gigatoken. It works for encodings that cut text into words as GPT-2 does."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        super().__init__(encoding)
        self._unchecked_bytes = CHECK_EVERY_BYTES  # so that the ids of the first text are compared
        self._start()

    def _start(self) -> None:
        """Load a new gigatoken tokenizer, which has no words in memory."""
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_format_ranks(self.encoding._mergeable_ranks))
            file.flush()
            self._fast: Any = BPETokenizer.from_tiktoken(file.name, "gpt2")
        self._bytes_since_start = 0

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text, shape (tokens,).

        After each CHECK_EVERY_BYTES bytes of text, the ids of a sample are compared with tiktoken's ids.
        Raises BadData if the ids differ.
        """
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
                    f"the token ids of gigatoken and tiktoken differ for a text that begins {sample[:80]!r}: "
                    "set tokenization.encoder to tiktoken in params.yaml, and report this text"
                )
        if self._bytes_since_start >= RESTART_EVERY_BYTES:
            self._start()
        return tokens


def load_encoder(folder: Path, choice: Literal["gigatoken", "tiktoken"]) -> TiktokenEncoder:
    """Return the encoder `choice` for the tokenizer in `folder`. Raises the errors of `load_encoding`.

    The encoder uses tiktoken instead of gigatoken if gigatoken is not installed, or if the tokenizer cuts
    text into words in another way than GPT-2.
    """
    encoding = load_encoding(folder)
    can_be_fast = encoding._pat_str == GPT2_PATTERN and find_spec("gigatoken") is not None
    return GigatokenEncoder(encoding) if choice == "gigatoken" and can_be_fast else TiktokenEncoder(encoding)
