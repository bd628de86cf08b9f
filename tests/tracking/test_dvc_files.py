"""DVC's files: hashes of folders, the cache, dvc.yaml and dvc.lock."""

import json
import shutil
from pathlib import Path

import pytest

from compactgpt.common.errors import BadData, OutsideFolder
from compactgpt.tracking.dvc_files import (
    Cache,
    Folder,
    all_outs,
    checkout,
    entry_key,
    keep_lock,
    md5_path,
    read_entries,
    read_stages,
    restore_lock,
    stages_before,
)
from tests.support import tracking_store
from tests.support.dvc_projects import dvc, git_repository

ROOT = Path(__file__).parents[2]
CHAIN = """
stages:
  a: {cmd: a, outs: [x]}
  b: {matrix: {name: "${b.names}"}, cmd: "b ${item.name}"}
"""


@pytest.fixture
def root(tmp_path):
    """A project with a folder `x`, which is in the cache, and a dvc.lock."""
    (tmp_path / "dvc.yaml").write_text(CHAIN)
    (tmp_path / "params.yaml").write_text("b: {names: [one, two]}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "b").write_text("2")
    (tmp_path / "x" / "a").write_text("1")
    tracking_store.save_lock(tmp_path, {"a": ["x"], "b@one": []})
    return tmp_path


def test_the_chain_has_the_items_of_a_matrix_and_the_hashes_of_dvc(root):
    entries = read_entries(Folder(root))
    assert [*read_stages(Folder(root))] == ["a", "b@one", "b@two"]
    assert all_outs(entries) == {"x": "8ea7b150bb7c692952804d00767e8840.dir"}  # as `dvc add` of 3.67.1 has it
    entry = entries["a"]
    assert entry_key(entry) == entry_key(dict(reversed(entry.items())))
    assert entry_key(entry) != entry_key({**entry, "cmd": "other"})
    (root / "params.yaml").write_text("b: {names: 5}")
    assert [*read_entries(Folder(root))] == ["a"]


@pytest.mark.parametrize(
    "text",
    ["- a", "stages: [a]", "stages: {a: 1}", "stages: {a: {outs: [x]}}", "stages: {a: {deps: null}}",
     "stages: {a: {params: {params.yaml: 1}}}", "a: 2001-99-99", "[" * 500],
)  # fmt: skip
def test_a_damaged_lock_is_refused_by_name(root, text):
    (root / "dvc.lock").write_text(text)
    with pytest.raises(BadData, match=r"^dvc\.lock .*: `git checkout dvc\.lock` restores it$"):
        read_entries(Folder(root))


@pytest.mark.parametrize(("kind", "path"), [("deps", "../other"), ("outs", "/etc/passwd"), ("outs", "")])
def test_a_lock_with_a_path_out_of_the_project_is_refused(root, kind, path):
    lock = {"schema": "2.0", "stages": {"a": {"cmd": "x", kind: [{"path": path, "md5": "0" * 32}]}}}
    (root / "dvc.lock").write_text(json.dumps(lock))
    with pytest.raises(OutsideFolder, match=r"the path .* is outside of the project"):
        read_entries(Folder(root))


def test_an_out_comes_from_the_cache_and_is_checked(root):
    md5, cache, place = md5_path(root / "x"), Cache(root), Folder(root)
    (root / "x" / "a").write_text("another")
    assert checkout(cache, place, "x", md5, root / "copy")
    assert md5_path(root / "copy") == md5
    assert not checkout(cache, place, "dvc.yaml", "0" * 32, root / "other")
    assert checkout(cache, place, "dvc.yaml", md5_path(root / "dvc.yaml"), root / "other")
    cache.files(md5)["a"].write_text("3")
    with pytest.raises(BadData, match="was altered"):
        checkout(cache, place, "x", md5, root / "copy")


@pytest.mark.parametrize("md5", ["../../../../etc/passwd", "ab/../../" + "0" * 23])
def test_a_hash_that_is_a_path_is_refused(root, md5):
    with pytest.raises(OutsideFolder, match="not a hash of DVC's cache"):
        Cache(root).has(md5)


@pytest.mark.parametrize("name", ["../other/a", "link/a"])
def test_a_listing_of_the_cache_writes_nothing_outside_of_its_folder(root, name):
    (root / "other").mkdir()
    (root / "copy").mkdir()
    (root / "copy/link").symlink_to(root / "other")
    (root / "new").write_text("from someone else")
    listing = [{"md5": tracking_store.cache_out(root, "new"), "relpath": name}]
    (cached := root / ".dvc/cache/files/md5/00" / f"{'0' * 30}.dir").parent.mkdir()
    cached.write_text(json.dumps(listing))
    with pytest.raises(OutsideFolder):
        checkout(Cache(root), Folder(root), "x", "0" * 32 + ".dir", root / "copy")
    assert list((root / "other").iterdir()) == []


def test_a_lock_that_dvc_was_writing_when_it_was_killed_is_restored(root):
    lock, complete = root / "dvc.lock", (ROOT / "dvc.lock").read_bytes()
    lock.write_bytes(complete)
    assert not restore_lock(root)
    keep_lock(root)
    for before in (b"schema", b"\n  ", b"md5: "):
        lock.write_bytes(complete[: complete.index(before)])
        assert restore_lock(root)
        assert lock.read_bytes() == complete
    lock.write_text("")
    shutil.rmtree(root / ".dvc")
    with pytest.raises(BadData, match=r"`git checkout dvc\.lock` restores it"):
        restore_lock(root)


def test_a_dvc_file_is_no_stage_on_which_another_depends(tmp_path):
    stages = {
        "download": {"cmd": "true", "deps": ["corpus"], "outs": ["a"]},
        "training": {"cmd": "true", "deps": ["a"], "outs": ["b"]},
    }
    project = git_repository(tmp_path / "project", stages)
    (project / "corpus").mkdir()
    (project / "corpus/input.txt").write_text("own text")
    dvc(project, "add", "-q", "corpus/input.txt")
    assert stages_before(project, "training") == ["download"]
