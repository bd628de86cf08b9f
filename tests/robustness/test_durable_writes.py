"""What a power loss must not undo: content is synced before the rename that publishes it, names after.

A file or folder counts as synced while it is as it was at its last fsync (inode, size, time of change).
"""

import errno
import os
from pathlib import Path

import pytest

from compactgpt.common import storage
from compactgpt.common.errors import DiskFailed
from compactgpt.config import load_params
from compactgpt.tracking.journal import Journal, journal_lines
from compactgpt.training.checkpoint import save_state
from compactgpt.training.optim import Optimizers
from tests.support.tiny_models import ROOT, tiny_gpt


class Syncs:
    """Notes each fsync under a folder, and checks what is renamed."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.synced, self.renamed = folder, {}, 0
        self.note(folder)  # as an fsync would: what is there before is safe
        for path in folder.rglob("*"):
            self.note(path)
        real_fsync = os.fsync

        def fsync(handle):
            real_fsync(handle)
            self.note(Path(f"/proc/self/fd/{handle}").resolve())

        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self.checked(getattr(os, name)))

    def note(self, path):
        self.synced[path.stat().st_ino] = self.state(path)

    def state(self, path):
        if path.is_dir():  # what a writer left behind is swept by the next one
            return sorted(name for name in os.listdir(path) if not name.startswith("."))
        return path.stat().st_size, path.stat().st_mtime_ns

    def unsafe(self, path):
        """What a power loss may change at a path and below it."""
        return [each for each in (path, *path.rglob("*")) if not self.is_safe(each)]

    def is_safe(self, path):
        return self.synced.get(path.stat().st_ino) == self.state(path)

    def checked(self, real):
        def rename(source, target):
            moved_aside = any(Path(path).name.endswith(".compactgpt-old") for path in (source, target))
            assert moved_aside or not self.unsafe(Path(source))
            real(source, target)
            self.renamed += 1

        return rename


@pytest.fixture
def syncs(tmp_path, monkeypatch):
    storage.write_text(tmp_path / "there/a.txt", "old")
    with storage.atomic_folder(tmp_path / "there/out") as folder:
        storage.write_text(folder / "a.txt", "old")
    return Syncs(tmp_path, monkeypatch)


def write_folder(path):
    with storage.atomic_folder(path) as folder:
        (folder / "deep/er").mkdir(parents=True)
        (folder / "deep/er/a.bin").write_bytes(b"new")
        (folder / "b.bin").write_bytes(b"new and more")


def write_state(path):
    model = tiny_gpt(40, n_layer=1, n_embd=4)
    optimizers = Optimizers(model, load_params(ROOT / "params.yaml").training)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizers.update(1, optimizers.grad_norm())
    save_state(path, "key", 2, model, optimizers, {"rows": []})


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path: storage.write_text(path, "new and longer"), "there/a.txt"),
        (lambda path: storage.write_text(path, "new"), "not/yet/there/a.txt"),
        (write_folder, "there/out"),
        (write_folder, "not/yet/there"),
        (write_state, "states"),
    ],
    ids=["a file", "a file in new folders", "a folder that replaces one", "a new folder", "a training state"],
)
def test_what_was_written_is_synced_before_it_is_renamed_and_its_name_after(syncs, write, name):
    write(syncs.folder / name)
    assert syncs.renamed
    assert syncs.unsafe(syncs.folder) == []


def test_the_journal_of_a_run_that_has_ended_is_synced(syncs):
    journal = Journal(syncs.folder, "training", {"tags": {}})
    journal.metrics({"loss": 3.0}, 1)
    journal.end("FINISHED")
    assert syncs.is_safe(journal.folder)
    assert syncs.is_safe(journal.folder / "journal.jsonl")


def lines_of(folder):
    (path,) = folder.glob("**/journal.jsonl")
    return journal_lines(path.read_bytes())


def test_a_line_that_the_disk_took_in_part_spoils_neither_its_neighbours(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "training", {"tags": {}})
    real = os.write

    def fail_halfway(handle, content):
        real(handle, content[: len(content) // 2])
        raise OSError(errno.EIO, "refused")

    monkeypatch.setattr(os, "write", fail_halfway)
    with pytest.raises(OSError, match="refused"):
        journal.metrics({"loss": 3.0}, 1)
    monkeypatch.setattr(os, "write", real)
    journal.metrics({"loss": 2.0}, 2)
    journal.end("FINISHED")
    assert [(line["kind"], line.get("step")) for line in lines_of(tmp_path)] == [
        ("start", None), ("metrics", 2), ("end", None),
    ]  # fmt: skip


def test_a_system_call_that_takes_a_part_of_a_line_gets_the_rest(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[:7]))
    Journal(tmp_path, "training", {"tags": {}}).end("FINISHED")
    assert [line["kind"] for line in lines_of(tmp_path)] == ["start", "end"]


def test_a_folder_whose_successor_cannot_be_renamed_stays(tmp_path, monkeypatch):
    write_folder(tmp_path / "out")
    before = (tmp_path / "out/manifest.json").read_bytes()
    real = os.rename

    def fail_second(source, target):
        if not Path(target).name.startswith("."):
            monkeypatch.setattr(os, "rename", real)
            raise OSError(errno.EIO, "refused")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(DiskFailed), storage.atomic_folder(tmp_path / "out") as folder:
        (folder / "b.bin").write_bytes(b"other")
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    storage.verified_manifest(tmp_path / "out")
