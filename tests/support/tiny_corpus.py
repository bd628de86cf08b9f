"""A hand-made byte-level tokenizer and small corpora, for the tests of compactgpt.data.

The spelling of bytes is written down here a second time on purpose: it checks the one of the project.
"""

import json
from pathlib import Path

from compactgpt.common.storage import atomic_folder
from compactgpt.data.documents import SHARD_BYTES, new_document, write_shards
from compactgpt.data.token_files import pack_documents, write_tokens
from compactgpt.data.tokenizer import save_gpt2

# As bytes_to_unicode of openai/gpt-2 puts it: printable bytes first, then the others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLING = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]  # Ġ spells a space
EOT = 256 + len(MERGES)


def tokenizer_files() -> tuple[bytes, bytes]:
    """vocab.bpe and encoder.json: 256 bytes, five merges, end-of-text."""
    vocab_bpe = "#version: 0.2\n" + "".join(f"{merge}\n" for merge in MERGES)
    words = [SPELLING[byte] for byte in PRINTABLE + OTHERS] + [merge.replace(" ", "") for merge in MERGES]
    ids = {word: number for number, word in enumerate([*words, "<|endoftext|>"])}
    return vocab_bpe.encode(), json.dumps(ids).encode()


def make_tokenizer(folder: Path) -> Path:
    save_gpt2(folder, *tokenizer_files())
    return folder


def make_documents(folder: Path, texts: list[str], shard_bytes: int = SHARD_BYTES) -> Path:
    facts = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    with atomic_folder(folder, facts) as temporary:
        documents = (new_document(text, f"tiny/{n}") for n, text in enumerate(texts))
        list(write_shards(temporary, documents, shard_bytes))
    return folder


def write_token_file(path: Path, documents, **vocabulary) -> None:
    """Write one split from (16-byte id, length in UTF-8 bytes, token ids) of each document."""
    write_tokens(path, [pack_documents(path, documents, **vocabulary)])
