"""Coverage-guided fuzzing of whatever reads bytes that others wrote: it takes them or says no in a sentence.

`make test-fuzz` runs it. Atheris (libFuzzer for Python) starts from whole files of each kind and changes
them towards code that was not reached before. Anything that is raised but a UserError, five seconds on one
input, or 2 GB of memory is a find: the input is kept and its traceback shown.
tests/test_bad_input.py tries the same readers with changes that know their formats.
"""

import argparse
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".state/fuzz"
MEMORY = "/dev/shm"  # noqa: S108  some readers sync what they write
SECONDS_AN_INPUT, MEMORY_MB = 5, 2048

Reader = Callable[[bytes], None]
Target = Callable[[Path], tuple[list[bytes], Reader]]
"""Given an empty folder: whole inputs to start from, and what reads one."""


def texts(name: str, inputs: list[bytes]) -> Target:
    """A file of the user's own corpus."""

    def target(folder: Path) -> tuple[list[bytes], Reader]:
        from compactgpt.textfiles import Rules, read_texts

        rules = Rules("text", 10_000, 5_000, 100_000, 200, 0)

        def read(content: bytes) -> None:
            (folder / name).write_bytes(content)
            for _text, _where, _row in read_texts(folder, name, rules):
                pass

        return inputs, read

    return target


def parquet_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"n": [1, 2, 3], "text": ["a", "b" * 99, "ä"]})
    found = []
    for more in ({}, {"compression": "zstd", "data_page_version": "2.0"}, {"use_dictionary": False}):
        pq.write_table(table, file := io.BytesIO(), data_page_size=64, **more)
        found.append(file.getvalue())
    return found


def parquet(folder: Path) -> tuple[list[bytes], Reader]:
    """A parquet file, whole: what Arrow lets through."""
    return texts("a.parquet", parquet_files())(folder)


def pages(_folder: Path) -> tuple[list[bytes], Reader]:
    """What we read ourselves of a parquet file: its pages, and where they lie."""
    from compactgpt.parquetpages import column_chunks, page_sizes

    def read(content: bytes) -> None:
        with suppress(ValueError):
            for start, end in column_chunks(io.BytesIO(content), "text"):
                assert 0 <= start <= end <= len(content)
        with suppress(ValueError):
            for unpacked, rows in page_sizes(io.BytesIO(content), 0, len(content)):
                assert unpacked >= 0 <= rows

    return [part for each in parquet_files() for part in (each, each[4:-300])], read


def tokens(name: str) -> Target:
    """One of the two files of a split."""

    def target(folder: Path) -> tuple[list[bytes], Reader]:
        from compactgpt.data import evaluation_windows, open_tokens
        from tests.tiny import save_split, save_tokenizer

        save_split(folder / "val.tokens", save_tokenizer(folder / "tokenizer"))
        whole = (folder / name).read_bytes()

        def read(content: bytes) -> None:
            (folder / name).write_bytes(content)
            split = open_tokens(folder / "val.tokens")
            for document in range(split.header.documents):
                split.document(document).tolist()
            list(evaluation_windows(split, 8))

        return [whole], read

    return target


def tensors(folder: Path) -> tuple[list[bytes], Reader]:
    """The weights of a model."""
    from compactgpt.checkpoint import _read_tensors, save_model
    from tests.tiny import tiny_gpt

    save_model(tiny_gpt(40, n_layer=1, n_embd=4), folder / "model", {})
    path = folder / "model/model.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _read_tensors(path)

    return [path.read_bytes()], read


def manifest(folder: Path) -> tuple[list[bytes], Reader]:
    """The manifest of a folder."""
    from compactgpt.storage import MANIFEST, atomic_folder, read_manifest

    with atomic_folder(folder / "a", {"step": 1}) as temporary:
        (temporary / "b.bin").write_bytes(b"b")
    path = folder / "a" / MANIFEST

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_manifest(folder / "a")

    return [path.read_bytes()], read


def params(folder: Path) -> tuple[list[bytes], Reader]:
    """A section of params.yaml."""
    from compactgpt.config import Training, load_section

    section = (ROOT / "params.yaml").read_text().split("\ntraining:\n")[1].split("\n\n")[0]

    def read(content: bytes) -> None:
        (folder / "a.yaml").write_bytes(content)
        load_section(folder / "a.yaml", Training)

    return ["\n".join(line[2:] for line in section.splitlines()).encode()], read


def chain(_folder: Path) -> tuple[list[bytes], Reader]:
    """dvc.lock, as another commit or a run in MLflow may have it."""
    from compactgpt.lineage import LOCK, Chain, entries_of, entry_key, outs

    def read(content: bytes) -> None:
        entries = entries_of(content)
        for entry in entries.values():
            entry_key(entry)
            outs(entry)
        Chain(list(entries), entries).out("models/compact")

    return [(ROOT / LOCK).read_bytes()[:3000].rpartition(b"\n  ")[0] + b"\n"], read


def journal(_folder: Path) -> tuple[list[bytes], Reader]:
    """The journal of a run."""
    from compactgpt.tracking.journal import journal_lines

    lines = [{"kind": "start", "pid": 1}, {"kind": "metrics", "step": 1, "values": {"a": 1.5}}]

    def read(content: bytes) -> None:
        journal_lines(content)

    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines)], read


def ledger(folder: Path) -> tuple[list[bytes], Reader]:
    """The journal of a tokenization that was killed."""
    from compactgpt.ledger import JOURNAL, open_ledger
    from tests.test_ledger import PIECES, make_piece

    with open_ledger(folder) as made:
        for documents in PIECES:
            made.add(make_piece(documents))
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def read(content: bytes) -> None:
        for path, before in whole.items():
            path.write_bytes(before)
        (folder / JOURNAL).write_bytes(content)
        with open_ledger(folder):
            pass

    return [whole[folder / JOURNAL]], read


def tokenizer(name: str) -> Target:
    """One of GPT-2's two tokenizer files, in a folder whose manifest says that it is right."""

    def target(folder: Path) -> tuple[list[bytes], Reader]:
        from compactgpt.encoding import load_encoding
        from compactgpt.storage import MANIFEST, sha256_file
        from tests.tiny import save_tokenizer

        save_tokenizer(folder / "a")
        path, sealed = folder / "a" / name, folder / "a" / MANIFEST
        facts = json.loads(sealed.read_bytes())

        def read(content: bytes) -> None:
            path.write_bytes(content)
            facts["files"][name] = {"bytes": len(content), "sha256": sha256_file(path)}
            sealed.write_text(json.dumps(facts))
            load_encoding(folder / "a")

        return [path.read_bytes()], read

    return target


def wheel(folder: Path) -> tuple[list[bytes], Reader]:
    """A wheel of a package index."""
    from compactgpt.wheels import _extract

    inputs = []
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(file := io.BytesIO(), "w", how) as archive:
            archive.writestr("a/x", b"content" * 9)
        inputs.append(file.getvalue())

    def read(content: bytes) -> None:
        (folder / "a.whl").write_bytes(content)
        _extract(folder / "a.whl", "a==1", "a/x", "0" * 64, folder / "x")

    return inputs, read


LINES = b'{"text": "one"}\n{"text": "\\u00e4"}\n'
TARGETS: dict[str, Target] = {
    "parquet": parquet,
    "parquet pages": pages,
    "jsonl": texts("a.jsonl", [LINES]),
    "jsonl.gz": texts("a.jsonl.gz", [gzip.compress(LINES)]),
    "text": texts("a.txt", ["\ufeffone\ntwo ä".encode()]),
    "token file": tokens("val.tokens"),
    "document index": tokens("val.index.safetensors"),
    "weights": tensors,
    "manifest": manifest,
    "params.yaml": params,
    "dvc.lock": chain,
    "run's journal": journal,
    "tokenization's journal": ledger,
    "vocab.bpe": tokenizer("vocab.bpe"),
    "encoder.json": tokenizer("encoder.json"),
    "wheel": wheel,
}


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as scratch:
        place, seeds = Path(scratch), Path(scratch) / "seeds"
        (place / "work").mkdir()
        seeds.mkdir()
        with atheris.instrument_imports(include=["compactgpt"]):
            inputs, read = TARGETS[name](place / "work")
            from compactgpt.errors import UserError
        for number, content in enumerate(inputs):
            (seeds / str(number)).write_bytes(content)

        def one(content: bytes) -> None:
            with suppress(UserError):
                read(content)

        kept = KEPT / name.replace(" ", "-")
        limits = [f"-timeout={SECONDS_AN_INPUT}", f"-rss_limit_mb={MEMORY_MB}", f"-max_total_time={seconds}"]
        told = ["-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={kept}-"]
        atheris.Setup([sys.argv[0], *limits, *told, "-max_len=20000", str(seeds)], one)
        atheris.Fuzz()


def look(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own, and print a row; whether nothing was found."""
    paths = [ROOT / ".state/atheris", ROOT / "src", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, name, "--seconds", str(seconds), "--here"],
        env=environment, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    tried, reached = (
        int((re.findall(pattern, done.stderr) or [0])[-1])
        for pattern in (r"number_of_executed_units:\s*(\d+)", r"cov: (\d+)")
    )
    print(f"| {name} | {tried:,} | {reached} | {'FOUND' if done.returncode else 'nothing'} |", flush=True)
    if done.returncode:
        _, _, raised = done.stdout.partition("=== Uncaught Python exception")
        print(raised or done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="a target")
    parser.add_argument("--here", action="store_true", help="one target, in this process")
    words = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if words.here:
        fuzz(words.targets[0], words.seconds)
    print("| what | inputs tried | branches reached | found |\n|---|---|---|---|")
    clean = [look(name, words.seconds) for name in words.targets or TARGETS]
    if not all(clean):
        raise SystemExit(f"the inputs are in {KEPT}")


if __name__ == "__main__":
    main()
