"""A killed download goes on where it stopped, to the same bytes; a damaged shard is named and made again."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compactgpt.common.storage import MANIFEST, verified_manifest
from compactgpt.data.documents import IdSet, read_row_group, row_groups
from compactgpt.data.sources import Limits, Origin, Piece, collect

ROOT = Path(__file__).parents[2]
LIMITS = Limits(shard_bytes=300)
TEXTS = [f"Text {n} of a corpus, some words long." * (n % 3) for n in range(60)]
TEXTS[20:20] = TEXTS[1:5]  # repeated within and across shards


class Numbered:
    """Two parts of texts; `stop_at` is where reading ends in an error."""

    name = "numbered"
    lengths = range(1, 10_000)
    identity = "v1"
    parts = (Origin("first"), Origin("second", "2", "MIT"))

    def __init__(self, stop_at=None):
        self.stop_at, self.seen, self.done = stop_at, [], 0

    def read(self, place):
        for number in range(place or 0, len(TEXTS)):
            if number == self.stop_at:
                raise ConnectionError("the line is dead")
            self.seen.append(number)
            self.done = number + 1
            yield Piece(TEXTS[number], f"numbered:{number}", number // 40)

    def place(self):
        return self.done


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(tmp_path, reader, limits=LIMITS, say=lambda _: None, name="documents"):
    return collect(reader, tmp_path / name, limits, state=tmp_path / "state", say=say)


@pytest.fixture
def undisturbed(tmp_path):
    report = make(tmp_path, Numbered(), name="undisturbed")
    return report, content(tmp_path / "undisturbed")


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path, undisturbed):
    report, _ = undisturbed
    manifest = verified_manifest(tmp_path / "undisturbed")
    assert len(manifest["shards"]) > 5
    assert set(manifest["shards"]) == set(manifest["files"])
    for shard in list(manifest["shards"].values())[:-1]:
        assert 300 <= shard["bytes"] < 300 + max(map(len, TEXTS))
    kept = list(dict.fromkeys(text for text in TEXTS if text))
    found = [each.text for group in row_groups(tmp_path / "undisturbed") for each in read_row_group(group)]
    assert found == kept
    assert report["documents"] == len(kept) == sum(each["documents"] for each in manifest["shards"].values())
    assert report["bytes"] == sum(map(len, kept)) == sum(each["bytes"] for each in report["sources"])
    assert report["left_out"] == {"empty": TEXTS.count(""), "short": 0, "long": 0, "duplicate": 3}
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("stop_at", [0, 3, 15, 23, 24, 41, 63])
def test_a_broken_download_goes_on_to_the_same_bytes(tmp_path, undisturbed, stop_at):
    report, expected = undisturbed
    with pytest.raises(ConnectionError):
        make(tmp_path, Numbered(stop_at))
    assert not (tmp_path / "documents").exists()
    said = []
    second = Numbered()
    assert make(tmp_path, second, say=said.append) == report
    assert content(tmp_path / "documents") == expected
    finished = [message for message in said if "it is not made again" in message]
    assert len(said) == len(finished)
    # What lies in finished shards was not read again.
    assert (not second.seen or second.seen[0] > 0) == bool(finished)
    if stop_at == 63:
        assert len(finished) >= 5


def test_a_damaged_shard_is_named_and_made_again_and_the_others_are_not(tmp_path, undisturbed):
    report, expected = undisturbed
    with pytest.raises(ConnectionError):
        make(tmp_path, Numbered(stop_at=63))
    kept = sorted((tmp_path / "state").glob("*/*.parquet"))
    spoiled = bytearray(kept[1].read_bytes())
    spoiled[50] ^= 1
    kept[1].write_bytes(spoiled)
    kept[3].with_suffix(".json").write_text("{}")
    said = []
    reader = Numbered()
    assert make(tmp_path, reader, say=said.append) == report
    assert content(tmp_path / "documents") == expected
    named = [message for message in said if "is damaged" in message]
    assert [kept[1].name in named[0], kept[3].name in named[1]] == [True, True]
    assert len(said) == len(kept)
    assert len(reader.seen) < len(TEXTS) / 1.5


def test_another_corpus_or_other_limits_never_meet_a_kept_shard(tmp_path, undisturbed):
    with pytest.raises(ConnectionError):
        make(tmp_path, Numbered(stop_at=63))
    said = []
    other = Numbered()
    other.identity = "v2"
    make(tmp_path, other, say=said.append)
    assert said == []
    with pytest.raises(ConnectionError):
        make(tmp_path, Numbered(stop_at=63))
    make(tmp_path, Numbered(), Limits(shard_bytes=500), say=said.append)
    assert said == []


@pytest.mark.parametrize("shard_bytes", [100, 300, 10**6])
def test_a_subset_is_the_first_documents_whatever_the_shards(tmp_path, shard_bytes):
    kept = list(dict.fromkeys(text for text in TEXTS if text))
    report = make(tmp_path, Numbered(), Limits(shard_bytes, max_documents=7))
    assert report["documents"] == 7
    assert report["bytes"] == sum(map(len, kept[:7]))
    report = make(tmp_path, Numbered(), Limits(shard_bytes, max_bytes=report["bytes"] + 5))
    assert report["documents"] == 7


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {src!r}]
from pathlib import Path
from tests.data.test_sources import LIMITS, Numbered
from compactgpt.data.sources import collect
class Dying(Numbered):
    def place(self):
        if self.done > 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.done
collect(Dying(), Path({folder!r}), LIMITS, state=Path({state!r}))
"""


def test_a_process_killed_with_sigkill_loses_only_its_unfinished_shard(tmp_path, undisturbed):
    report, expected = undisturbed
    code = KILLED.format(
        root=str(ROOT),
        src=str(ROOT / "src"),
        folder=str(tmp_path / "documents"),
        state=str(tmp_path / "state"),
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    notes = sorted((tmp_path / "state").glob("*/*.json"))
    assert notes
    stamps = {path: path.with_suffix(".parquet").stat().st_ino for path in notes}
    said = []
    reader = Numbered()
    assert make(tmp_path, reader, say=said.append) == report
    assert content(tmp_path / "documents") == expected
    assert len(said) == len(notes)
    # The finished shards are the very files that the killed process wrote.
    for path, inode in stamps.items():
        assert (tmp_path / "documents" / path.with_suffix(".parquet").name).stat().st_ino == inode
    assert not list(tmp_path.glob(".documents.*"))


def test_ids_met_before_are_found_in_any_order():
    generator = random.Random(7)
    ids = [generator.randbytes(15).hex() + end for end in ("00", "01", "ff") for _ in range(200)]
    ids += ["00" * 16, "00" * 15 + "01", "ff" * 16]
    drawn = generator.choices(ids, k=3000)
    ours, reference = IdSet(recent=64), set()
    for each in drawn:
        assert ours.add(each) == (each not in reference)
        reference.add(each)


def test_the_manifest_tells_every_shards_documents_bytes_and_hash(tmp_path, undisturbed):
    manifest = json.loads((tmp_path / "undisturbed" / MANIFEST).read_text())
    for name, shard in manifest["shards"].items():
        assert set(shard) == {"documents", "bytes"}
        assert set(manifest["files"][name]) == {"bytes", "sha256"}
