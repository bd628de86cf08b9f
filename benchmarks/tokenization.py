"""Tokenize one corpus as nanoGPT does and as we do, and print the time and memory of each.

    python -m benchmarks.tokenization                      # 100 MB
    python -m benchmarks.tokenization --megabytes 1000

nanoGPT's way follows its data/openwebtext/prepare.py: `datasets.map` with tiktoken, then a mapped file.
The corpus repeats data/documents with shuffled paragraphs. One word in a hundred is random: real text always
brings words that are in no cache. CPU seconds and memory (PSS) are sums over the processes of a way.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compactgpt.common.storage import atomic_folder
from compactgpt.config import Tokenization
from compactgpt.data.documents import Document, new_document, read_row_group, row_groups, write_shards
from compactgpt.data.token_files import HEADER_BYTES
from compactgpt.data.tokenization import tokenize

NEW_WORD_EVERY = 100  # words


def main() -> None:
    options = parse()
    if options.only:
        WAYS[options.only](Path(options.folder), options)
        return
    with tempfile.TemporaryDirectory(prefix="bench-tokenization-") as scratch:
        compare(Path(scratch), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="nanoGPT's way of tokenizing and ours, side by side")
    parser.add_argument("--megabytes", type=int, default=100, help="of text in the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", default="data/documents", help="what the corpus is made from")
    parser.add_argument("--tokenizer", default="data/tokenizer")
    parser.add_argument("--encoder", default="gigatoken", choices=["gigatoken", "tiktoken"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(scratch: Path, options: argparse.Namespace) -> None:
    make_corpus(scratch / "documents", options)
    size = json.loads((scratch / "documents" / "manifest.json").read_text())
    print(f"corpus: {size['bytes'] / 1e6:,.0f} MB of text, {size['documents']:,} documents")
    heads = ("seconds", "CPU s", "MB/s", "tokens/s", "memory MiB", "written MB")
    print(" ".join([f"{'way':10}", *(f"{head:>11}" for head in heads)]))
    results = {}
    for way in WAYS:
        results[way] = found = measure(way, scratch, options)
        megabytes, seconds = size["bytes"] / 1e6, found["seconds"]
        figures = [
            f"{seconds:.1f}",
            f"{found['cpu']:.1f}",
            f"{megabytes / seconds:.1f}",
            f"{found['tokens'] / seconds:,.0f}",
            f"{found['memory'] / 2**20:,.0f}",
            f"{found['written'] / 1e6:,.0f}",
        ]
        print(" ".join([f"{way:10}", *(f"{figure:>11}" for figure in figures)]), flush=True)
    same = results["ours"]["ids"] == results["nanogpt"]["ids"]
    ratio, of_cpu = (results["nanogpt"][key] / results["ours"][key] for key in ("seconds", "cpu"))
    print(f"ratio of tokens/s: {ratio:.1f}; of CPU seconds: {of_cpu:.1f}")
    print("every id is as frequent in both" if same else "THE IDS DIFFER")


def make_corpus(folder: Path, options: argparse.Namespace) -> None:
    wanted = 1_000_000 * options.megabytes
    groups = row_groups(Path(options.documents))
    generator = random.Random(1)  # noqa: S311 (no secret)
    made = {"documents": 0, "bytes": 0}

    def documents() -> Iterator[Document]:
        for group in itertools.cycle(groups):
            for document in read_row_group(group):
                text = vary(document.text, generator)
                made["documents"] += 1
                made["bytes"] += len(text.encode())
                yield new_document(text, f"bench/{made['documents']}")
                if made["bytes"] >= wanted:
                    return

    with atomic_folder(folder, made, kind="documents") as temporary:
        list(write_shards(temporary, documents()))


def vary(text: str, generator: random.Random) -> str:
    paragraphs = text.split("\n\n")
    generator.shuffle(paragraphs)
    words = "\n\n".join(paragraphs).split(" ")
    for place in range(generator.randrange(NEW_WORD_EVERY), len(words), NEW_WORD_EVERY):
        words[place] = "".join(generator.choices(string.ascii_lowercase, k=generator.randrange(3, 10)))
    return " ".join(words)


def measure(way: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in its own process, and measure the memory ten times a second."""
    folder = scratch / way
    folder.mkdir()
    words = [
        *("--only", way, "--folder", str(folder), "--workers", str(options.workers)),
        *("--tokenizer", str(Path(options.tokenizer).resolve()), "--encoder", options.encoder),
    ]
    environment = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tokenization", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    memory = 0
    while process.poll() is None:
        memory = max(memory, held(process.pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit((folder / "log").read_text())
    found = json.loads((folder / "result.json").read_text())
    ids = count_ids(folder)
    shutil.rmtree(folder)
    return {**found, "ids": ids, "tokens": sum(ids), "memory": memory}


def held(pid: int) -> int:
    """Return the memory of a process and its children in bytes; a shared page counts once (PSS)."""
    total = 0
    with suppress(psutil.Error):  # a process may end at any time
        root = psutil.Process(pid)
        for each in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total


def finish(folder: Path) -> None:
    """Write result.json: only /proc of this process counts the bytes that its ended children wrote."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    seconds = time.time() - psutil.Process().create_time()
    result = {"seconds": seconds, "cpu": sum(os.times()[:4]), "written": int(fields["write_bytes"])}
    (folder / "result.json").write_text(json.dumps(result))


def ours(folder: Path, options: argparse.Namespace) -> None:
    tokenize(
        folder.parent / "documents",
        Path(options.tokenizer),
        folder / "tokens",
        Tokenization(val_fraction=0.0065, encoder=options.encoder),
        num_workers=options.workers,
        state=folder / "state",
    )
    finish(folder)


def nanogpt(folder: Path, options: argparse.Namespace) -> None:
    from datasets import load_dataset

    from compactgpt.data.tokenizer import load_encoding

    encoding = load_encoding(Path(options.tokenizer))  # tiktoken's own, without a network

    def encode(document: dict[str, str]) -> dict[str, Any]:
        tokens = encoding.encode_ordinary(document["text"])
        tokens.append(encoding.eot_token)
        return {"ids": tokens, "len": len(tokens)}

    shards = [str(path) for path in sorted((folder.parent / "documents").glob("*.parquet"))]
    processes = min(len(shards), options.workers)
    corpus = load_dataset("parquet", data_files=shards, split="train", num_proc=processes)
    splits = corpus.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    columns = ["id", "text", "source", "part"]
    encoded = splits.map(encode, remove_columns=columns, desc="encoding", num_proc=options.workers)
    for split, rows in encoded.items():
        total = int(np.sum(rows["len"], dtype=np.uint64))
        target = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        place, parts = 0, min(1024, len(rows))
        for part in range(parts):
            batch = rows.shard(num_shards=parts, index=part, contiguous=True).with_format("numpy")
            tokens = np.concatenate(batch["ids"])
            target[place : place + len(tokens)] = tokens
            place += len(tokens)
        target.flush()
    finish(folder)


def count_ids(folder: Path) -> list[int]:
    """Return how often each id is in the files that one way wrote."""
    counts = np.zeros(50257, np.int64)
    places = [(path, HEADER_BYTES) for path in folder.glob("tokens/*.tokens")]
    for path, start in places or [(path, 0) for path in folder.glob("*.bin")]:
        with open(path, "rb") as file:
            file.seek(start)
            while block := file.read(2**24):
                counts += np.bincount(np.frombuffer(block, "<u2"), minlength=50257)
    return counts.tolist()


WAYS = {"nanogpt": nanogpt, "ours": ours}

if __name__ == "__main__":
    main()
