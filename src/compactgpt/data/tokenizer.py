"""Save GPT-2's tokenizer in a folder, load it without a network, and encode text.

The folder contains OpenAI's two published files, vocab.bpe and encoder.json.
The library gigatoken returns the token ids of tiktoken 14 times as fast (docs/benchmarks.md).
"""

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tiktoken

from compactgpt.common.errors import BadData
from compactgpt.common.storage import atomic_folder, verified_manifest, write_bytes
from compactgpt.data.token_files import ENCODER_JSON, END_OF_TEXT, VOCAB_BPE

# The regular expression that cuts text into words for GPT-2, copied from tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# After this many bytes, gigatoken's ids of one text are compared with tiktoken's.
CHECK_EVERY_BYTES = 2**20
CHECK_CHARACTERS = 2**11  # only the beginning of a longer text is compared
# gigatoken keeps every word in memory, so it is loaded again after this many bytes.
# A megabyte of documentation takes 0.3 MB of memory, a megabyte of random words 9 MB.
RESTART_EVERY_BYTES = 2**25

TokenIds = npt.NDArray[np.uint32]


# --- saving and loading


def save_gpt2(folder: Path, vocab_bpe: bytes, encoder_json: bytes) -> dict[str, Any]:
    """Save vocab.bpe and encoder.json in `folder`, and return the facts in its manifest.

    Raises BadData if `encoder_json` is damaged.
    """
    encoding = _gpt2_encoding(encoder_json)
    pattern, special_tokens = encoding._pat_str, encoding._special_tokens
    settings = json.dumps([pattern, special_tokens], sort_keys=True)
    facts = {
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "pattern": pattern,
        "special_tokens": special_tokens,
        # The hash of everything that determines the token ids.
        "tokenizer_sha256": hashlib.sha256(_format_ranks(encoding) + settings.encode()).hexdigest(),
    }
    with atomic_folder(folder, facts, kind="tokenizer") as temporary:
        write_bytes(temporary / VOCAB_BPE, vocab_bpe)
        write_bytes(temporary / ENCODER_JSON, encoder_json)
    return facts


def load_encoding(folder: Path) -> tiktoken.Encoding:
    """Return the tiktoken encoding that is saved in a tokenizer folder.

    Raises MissingInput if the folder does not exist, BadData if a file was altered.
    """
    verified_manifest(folder)
    return _gpt2_encoding((folder / ENCODER_JSON).read_bytes())


def _gpt2_encoding(encoder_json: bytes) -> tiktoken.Encoding:
    """Return GPT-2's encoding from the content of encoder.json."""
    table = unicode_to_bytes()
    try:
        ids = json.loads(encoder_json)
        special_tokens = {END_OF_TEXT: ids.pop(END_OF_TEXT, len(ids))}
        # A token's id is also its rank in the order of merges.
        ranks = {bytes(table[character] for character in word): ids[word] for word in ids}
        if sorted([*ranks.values(), *special_tokens.values()]) != list(range(len(ranks) + 1)):
            raise ValueError("the token ids are not 0, 1, 2, ...")
        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(
            f"{ENCODER_JSON} is not a file of GPT-2's tokenizer ({error!r}): download it again"
        ) from error


def _format_ranks(encoding: tiktoken.Encoding) -> bytes:
    """Return the content of a `.tiktoken` file: on each line, a token in base64 and its id."""
    ordered = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def unicode_to_bytes() -> dict[str, int]:
    """Return a table: a character in GPT-2's published files, and its byte.

    A printable byte has the character with this code. The other bytes have the characters from U+0100 on.
    The bytes are in the order of their token ids, from 0.
    The table is the inverse of bytes_to_unicode in openai/gpt-2, src/encoder.py.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


# --- encoding


def encode(encoding: tiktoken.Encoding, text: str) -> TokenIds:
    """Return tiktoken's token ids of a text, shape (tokens,).

    The characters `<|endoftext|>` are encoded as ordinary text.
    Raises BadData if tiktoken can't encode the text.
    """
    # `Encoding.encode` returns a Python list, which takes 10 times the memory.
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:  # for example, the text has a million spaces in a row
        raise BadData(
            f"tiktoken can't encode a document that begins {text[:40]!r} ({error}): remove the document, "
            "or remove its long white space"
        ) from error


# gigatoken knows the letters and digits of Unicode 17, tiktoken only those of Unicode 16.
# This expression matches the UTF-8 of every new character, and of some older ones (Telugu, Kannada).
_MAY_BE_NEW = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")


class GigatokenEncoder:
    """Encodes text by gigatoken, and compares some of gigatoken's token ids with tiktoken's."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self._unchecked_bytes = CHECK_EVERY_BYTES  # so `encode` compares the ids of the first text
        self._start()

    def _start(self) -> None:
        """Load gigatoken with no words in memory."""
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_format_ranks(self.encoding))
            file.flush()
            self._fast: Any = BPETokenizer.from_tiktoken(file.name, "gpt2")
        self._bytes_since_start = 0

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text, shape (tokens,).

        Once per CHECK_EVERY_BYTES bytes, tiktoken encodes the beginning of `text`, too.
        Raises BadData if tiktoken's ids differ from gigatoken's.
        """
        content = text.encode()
        if not text.isascii() and _MAY_BE_NEW.search(content):
            return encode(self.encoding, text)
        tokens: TokenIds = self._fast.encode(content)
        self._unchecked_bytes += len(content)
        self._bytes_since_start += len(content)
        if self._unchecked_bytes >= CHECK_EVERY_BYTES:
            self._unchecked_bytes = 0
            sample = text[:CHECK_CHARACTERS]
            if not np.array_equal(self._fast.encode(sample.encode()), encode(self.encoding, sample)):
                raise BadData(
                    f"the token ids of gigatoken and tiktoken differ for a text that begins {sample[:80]!r}: "
                    "set tokenization.encoder to tiktoken in params.yaml, and report this text"
                )
        if self._bytes_since_start >= RESTART_EVERY_BYTES:
            self._start()
        return tokens


def load_encoder(folder: Path, library: Literal["gigatoken", "tiktoken"]) -> Callable[[str], TokenIds]:
    """Return a function that encodes text by `library`, with the tokenizer in `folder`.

    Raises the errors of `load_encoding`.
    """
    encoding = load_encoding(folder)
    return GigatokenEncoder(encoding).encode if library == "gigatoken" else partial(encode, encoding)
