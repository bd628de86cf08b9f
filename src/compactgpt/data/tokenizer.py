"""Save and load GPT-2's tokenizer, and encode text.

The library gigatoken returns the same token ids as tiktoken, and is 14 times as fast (docs/benchmarks.md).
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

# Each time gigatoken has encoded this many bytes, the token ids of one text are compared with tiktoken's.
CHECK_EVERY_BYTES = 2**20
CHECK_CHARACTERS = 2**11  # the comparison with tiktoken uses only this many characters of a text
# gigatoken keeps every word in memory (0.3 to 9 MB per MB of text). To free this memory, gigatoken is loaded
# again after this many bytes of text.
RESTART_EVERY_BYTES = 2**25

TokenIds = npt.NDArray[np.uint32]


# --- saving and loading


def save_gpt2(folder: Path, vocab_bpe: bytes, encoder_json: bytes) -> dict[str, Any]:
    """Save the two files of a tokenizer in `folder`, and return its settings, such as `vocab_size`.

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
    """Return a map from each character in GPT-2's published files to the byte that the character stands for.

    The entries have the order of GPT-2's token ids for single bytes. The function `bytes_to_unicode` in
    openai/gpt-2, src/encoder.py, returns the inverse map.
    """
    # GPT-2's files write a byte that is not printable, or is a space, as a character from U+0100 on.
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
    try:
        # `Encoding.encode` returns a Python list, which takes 10 times the memory of an array.
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:  # for example, the text has a million spaces in a row
        raise BadData(
            f"tiktoken can't encode a document that begins {text[:40]!r} ({error}): remove the document, "
            "or remove its long white space"
        ) from error


# If a text matches this pattern, tiktoken encodes the text, because gigatoken cuts words differently at
# letters that are new in Unicode 17. The pattern matches the first UTF-8 bytes of the new letters. Some
# older letters begin with the same bytes: tiktoken then encodes a text that gigatoken could encode, too.
_MAY_BE_NEW = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")


class GigatokenEncoder:
    """Encodes text with gigatoken, and checks on samples that tiktoken gives the same token ids."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self._unchecked_bytes = CHECK_EVERY_BYTES  # so that the first text is checked
        self._load_gigatoken()

    def _load_gigatoken(self) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(_format_ranks(self.encoding))
            file.flush()
            self._fast: Any = BPETokenizer.from_tiktoken(file.name, "gpt2")
        self._bytes_since_start = 0

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of a text, shape (tokens,).

        Raises BadData if gigatoken's ids of a sample differ from tiktoken's.
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
            self._load_gigatoken()
        return tokens


def load_encoder(folder: Path, library: Literal["gigatoken", "tiktoken"]) -> Callable[[str], TokenIds]:
    """Return a function that encodes text with `library` and the tokenizer in `folder`."""
    encoding = load_encoding(folder)
    return GigatokenEncoder(encoding).encode if library == "gigatoken" else partial(encode, encoding)
