"""What a power loss must not undo: content is synced before the rename that publishes it, the name after."""

import errno
import os
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
    for write in (lambda path: storage.write_text(path, "new"), write_folder):
        for name in ("out", "out", "not/yet/there"):
            write(tmp_path / write.__name__ / name)
            assert (tmp_path / write.__name__ / name).parent in synced
        assert {tmp_path / write.__name__ / "not", tmp_path / write.__name__ / "not/yet"} <= synced
    journal = Journal(tmp_path, "training", {"tags": {}})
    journal.end("FINISHED")
    assert {journal.folder, journal.folder / "journal.jsonl"} <= synced


def test_a_line_of_the_journal_that_was_written_in_part_damages_no_other(tmp_path, monkeypatch):
    real = os.write
    journal = Journal(tmp_path, "training", {"tags": {}})

    def fail_halfway(handle, content):
        real(handle, content[: len(content) // 2])
        raise OSError(errno.EIO, "refused")

    monkeypatch.setattr(os, "write", fail_halfway)
    with pytest.raises(OSError, match="refused"):
        journal.metrics({"loss": 3.0}, 1)
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[:7]))  # the rest follows
    journal.metrics({"loss": 2.0}, 2)
    journal.end("FINISHED")
    lines = journal_lines((journal.folder / "journal.jsonl").read_bytes())
    kinds = [(line["kind"], line.get("step")) for line in lines]
    assert kinds == [("start", None), ("metrics", 2), ("end", None)]
