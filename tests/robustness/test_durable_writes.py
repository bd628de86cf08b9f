"""What a power loss must not undo: content is synced before the rename that publishes it, the name after."""

import os
import resource
from pathlib import Path

import pytest

from compactgpt.common import storage
from compactgpt.tracking.journal import Journal, journal_lines


@pytest.fixture
def synced(tmp_path, monkeypatch):
    """The paths that were synced. A rename of a path that was not synced, or holds such a one, fails."""
    paths = set()
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(handle):
        real["fsync"](handle)
        paths.add(Path(f"/proc/self/fd/{handle}").resolve())

    def rename(source, target, name):
        if not any(Path(path).name.endswith(".compactgpt-old") for path in (source, target)):
            assert {Path(source), *Path(source).rglob("*")} <= paths
        paths.discard(Path(target).parent)  # its names have changed
        paths.add(Path(target))
        real[name](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda source, target, name=name: rename(source, target, name))
    return paths


def write_folder(path):
    with storage.atomic_folder(path) as folder:
        (folder / "deep/er").mkdir(parents=True)
        (folder / "deep/er/a.bin").write_bytes(b"new")


def test_what_was_written_is_synced_before_it_is_renamed_and_its_name_after(tmp_path, synced):
    for kind, write in (("file", lambda path: storage.write_text(path, "new")), ("folder", write_folder)):
        root = tmp_path / kind
        for name in ("out", "out", "not/yet/there"):
            write(root / name)
            assert (root / name).parent in synced
        assert {root / "not", root / "not/yet"} <= synced
    journal = Journal(tmp_path, "training", {"tags": {}})
    journal.end("FINISHED")
    assert {journal.folder, journal.folder / "journal.jsonl"} <= synced


def test_a_line_of_the_journal_that_a_full_disk_cut_off_is_completed_later(tmp_path):
    journal = Journal(tmp_path, "training", {"tags": {}})
    path, (soft, hard) = journal.folder / "journal.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        with pytest.raises(OSError, match="File too large"):
            journal.metrics({"loss": 3.0}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.metrics({"loss": 2.0}, 2)
    journal.end("FINISHED")
    kinds = [(line["kind"], line.get("step")) for line in journal_lines(path.read_bytes())]
    assert kinds == [("start", None), ("metrics", 1), ("metrics", 2), ("end", None)]
