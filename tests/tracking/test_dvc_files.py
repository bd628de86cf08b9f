"""DVC's files as DVC writes them: names of folders, the cache, the chain; and any version of them."""

import shutil
from pathlib import Path

import pytest

from compactgpt.common.errors import BadData
from compactgpt.tracking.dvc_files import (
    Cache,
    Commit,
    Folder,
    checkout,
    entry_key,
    keep_lock,
    md5_path,
    read_chain,
    restore_lock,
)
from tests.support import tracking_store

ROOT = Path(__file__).parents[2]

CHAIN = """
stages:
  a: {cmd: a, outs: [x]}
  b: {matrix: {name: "${b.names}"}, cmd: "b ${item.name}"}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dvc.yaml").write_text(CHAIN)
    (tmp_path / "params.yaml").write_text("b: {names: [one, two]}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "b").write_text("2")
    (tmp_path / "x" / "a").write_text("1")
    tracking_store.save_lock(tmp_path, {"a": ["x"], "b@one": []})
    return tmp_path


def test_a_folder_is_named_as_dvc_names_it(root):
    # what `dvc add` of 3.67.1 wrote for it
    assert md5_path(root / "x") == "8ea7b150bb7c692952804d00767e8840.dir"


def test_the_chain_has_the_items_of_a_matrix_in_order(root):
    chain = read_chain(Folder(root))
    assert chain.stages == ["a", "b@one", "b@two"]
    assert not chain.complete
    assert chain.out("x") == md5_path(root / "x")
    assert chain.out("y") == ""


@pytest.mark.parametrize(
    "text",
    ["- a", "stages: [a]", "stages: {a: 1}", "stages: {a: {outs: [x]}}", "stages: {a: {outs: [{path: x}]}}",
     "stages: {a: {deps: null}}", "stages: {a: {params: {params.yaml: 1}}}", "stages: &a {b: {cmd: *a}}",
     "a: 2001-99-99", "[" * 500, "stages: {a: {deps: [{path: x, md5: {1: y, z: 0}}]}}"],
)  # fmt: skip
def test_a_lock_that_is_none_is_refused_by_name(root, text):
    (root / "dvc.lock").write_text(text)
    with pytest.raises(BadData, match=r"^dvc\.lock .*: `git checkout dvc\.lock` restores it$"):
        read_chain(Folder(root))


def test_a_matrix_that_names_nothing_has_no_items(root):
    for params in ("b: {names: 5}", "b: 5", ""):
        (root / "params.yaml").write_text(params)
        assert read_chain(Folder(root)).stages == ["a"]
    (root / "dvc.yaml").write_text("stages: {b: {matrix: {x: [1], y: [2]}}}")
    with pytest.raises(BadData, match=r"^dvc\.yaml is not as DVC reads it"):
        read_chain(Folder(root))


def test_an_out_comes_from_the_cache_even_if_the_folder_has_another(root, tmp_path):
    md5, target = tracking_store.cache_out(root, "x"), tmp_path / "copy"
    (root / "x" / "a").write_text("another")
    assert checkout(Cache(root), Folder(root), "x", md5, target)
    assert md5_path(target) == md5
    assert (target / "a").read_text() == "1"


def test_an_out_that_is_not_to_be_had_is_not_made_up(root, tmp_path):
    (root / "y").write_text("new")
    assert not checkout(Cache(root), Folder(root), "y", "0" * 32, tmp_path / "copy")
    assert checkout(Cache(root), Folder(root), "y", md5_path(root / "y"), tmp_path / "copy")


def test_a_damaged_cache_is_noticed(root, tmp_path):
    md5 = tracking_store.cache_out(root, "x")
    Cache(root).files(md5)["a"].write_text("3")
    with pytest.raises(BadData, match="was altered"):
        checkout(Cache(root), Folder(root), "x", md5, tmp_path / "copy")


def test_a_commit_is_read_without_touching_the_work_tree(root):
    for words in [["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]]:
        tracking_store.git(root, *words)
    (root / "params.yaml").write_text("changed")
    assert Commit(root, "HEAD").read("params.yaml") == b"b: {names: [one, two]}"
    assert Commit(root, "HEAD").read("absent") is None


def test_the_key_of_an_entry_is_of_all_that_it_says(root):
    entry = read_chain(Folder(root)).entries["a"]
    assert entry_key(entry) == entry_key(dict(reversed(entry.items())))
    assert entry_key(entry) != entry_key({**entry, "cmd": "other"})


@pytest.mark.parametrize("before", [b"schema", b"\n  ", b"md5: "])
def test_a_lock_that_dvc_was_killed_over_is_put_back(root, before):
    lock = root / "dvc.lock"
    lock.write_bytes(whole := (ROOT / "dvc.lock").read_bytes())
    assert not restore_lock(root)
    keep_lock(root)
    lock.write_bytes(whole[: whole.index(before)])
    assert restore_lock(root)
    assert lock.read_bytes() == whole
    assert not restore_lock(root)


def test_a_lock_that_is_as_dvc_has_it_is_left_alone_and_one_without_a_copy_is_named(root):
    lock = root / "dvc.lock"
    keep_lock(root)
    lock.write_text("schema: '2.0'\nstages: {}\n")
    assert not restore_lock(root)
    lock.write_text("")
    shutil.rmtree(root / ".dvc")
    with pytest.raises(BadData, match=r"`git checkout dvc\.lock` restores it"):
        restore_lock(root)
    lock.unlink()
    assert not restore_lock(root)
