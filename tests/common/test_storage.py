"""Files are written whole or not at all, and checked when they are read."""

import ast
import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from compactgpt.common import storage
from compactgpt.common.errors import BadData, DiskFailed, DiskFull, MissingInput, NotAllowed


@pytest.fixture
def small_disk():
    """No file of this process may grow beyond 64 KiB: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_half(write):
    write(b"half")
    raise KeyError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_midway_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")
    with pytest.raises(KeyError), storage.atomic_file(path) as file:
        write_half(file.write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path, small_disk):
    path = tmp_path / "a.bin"
    storage.write_bytes(path, b"old")
    with pytest.raises(DiskFull, match=r"no room left .*a\.bin.*run the same command again"):
        storage.write_bytes(path, bytes(2**17))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_full_disk_leaves_the_old_folder(tmp_path, small_disk):
    with storage.atomic_folder(tmp_path / "out") as folder:
        storage.write_text(folder / "a.txt", "old")
    with pytest.raises(DiskFull, match="no room left"), storage.atomic_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_bytes(bytes(2**17))
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def refuse(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    number = errno.EIO
    with pytest.raises(DiskFailed, match=r"disk failed while writing .*a\.txt: nothing was changed"):
        storage.write_text(tmp_path / "a.txt", "x")
    number = errno.EROFS
    with pytest.raises(OSError, match="Read-only"):
        storage.write_text(tmp_path / "a.txt", "x")


def test_a_folder_is_replaced_as_one(tmp_path):
    for content in ("first", "second"):
        with storage.atomic_folder(tmp_path / "out") as folder:
            storage.write_text(folder / f"{content}.txt", content)
    assert names(tmp_path / "out") == ["manifest.json", "second.txt"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_fails_midway_leaves_the_old_one(tmp_path):
    with storage.atomic_folder(tmp_path / "out") as folder:
        storage.write_text(folder / "a.txt", "old")
    with pytest.raises(KeyError), storage.atomic_folder(tmp_path / "out") as folder:
        write_half((folder / "b.txt").write_bytes)
    assert names(tmp_path / "out") == ["a.txt", "manifest.json"]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".out.{ended.pid}.compactgpt-tmp").mkdir()
    (tmp_path / f".out.{ended.pid}.compactgpt-old").mkdir()
    (tmp_path / f".a.txt.{ended.pid}.compactgpt-tmp").write_text("half")
    kept = [f".out.{os.getppid()}.compactgpt-tmp", f".b.txt.{ended.pid}.compactgpt-tmp", ".out.notes"]
    kept += [".a.txt.1.bak", f".a.txt.{ended.pid}.old", f".a.txt.backup.{ended.pid}.compactgpt-old"]
    for name in kept:
        (tmp_path / name).write_text("somebody else's")
    with storage.atomic_folder(tmp_path / "out"):
        pass
    storage.write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([*kept, "out", "a.txt"])


def test_the_manifest_says_facts_sizes_and_hashes(tmp_path):
    facts = {"documents": 0}
    with storage.atomic_folder(tmp_path / "out", facts) as folder:
        storage.write_text(folder / "sub" / "a.txt", "héllo")
        facts["documents"] = 3
    manifest = storage.verified_manifest(tmp_path / "out")
    digest = hashlib.sha256("héllo".encode()).hexdigest()
    assert manifest == {"documents": 3, "files": {"sub/a.txt": {"bytes": 6, "sha256": digest}}}


def make_output(folder, kind="tokens", content="new", **options):
    with storage.atomic_folder(folder, kind=kind, **options) as temporary:
        storage.write_text(temporary / "a.txt", content)


def assert_refused(folder, says, **options):
    """Nothing below the folder's parent changes."""
    before = tree(folder.parent)
    with pytest.raises(NotAllowed, match=says):
        make_output(folder, **options)
    assert tree(folder.parent) == before


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


def test_a_folder_with_files_of_someone_else_is_refused(tmp_path):
    (thesis := tmp_path / "papers/thesis.tex").parent.mkdir()
    thesis.write_text("five years")
    assert_refused(thesis.parent, r"papers has files that this command did not write")
    assert_refused(thesis.parent, "did not write", overwrite=True)
    assert_refused(thesis, "thesis.tex is a file")
    (thesis.parent / "manifest.json").write_text('{"files": {}}')  # of another tool
    assert_refused(thesis.parent, "did not write", overwrite=True)


def test_an_earlier_output_of_the_same_kind_is_replaced_and_of_another_refused(tmp_path):
    make_output(tmp_path / "out")
    make_output(tmp_path / "out", content="newer")
    assert (tmp_path / "out/a.txt").read_text() == "newer"
    assert storage.verified_manifest(tmp_path / "out")["kind"] == "tokens"
    assert_refused(tmp_path / "out", "did not write", kind="export", overwrite=True)
    (tmp_path / "empty").mkdir()
    make_output(tmp_path / "empty")


@pytest.mark.parametrize("name", ["notes.txt", "a.txt", "sub/link"])
def test_an_earlier_output_is_kept_where_something_was_added_and_needs_overwrite_where_changed(
    tmp_path, name
):
    make_output(tmp_path / "out")
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nowhere") if name == "sub/link" else path.write_text("new")
    if name == "a.txt":
        path.write_text("old")
    assert_refused(tmp_path / "out", f"{name} was changed since")
    if name != "a.txt":  # nobody's manifest names it
        assert_refused(tmp_path / "out", f"{name} was changed since", overwrite=True)
        path.unlink()
        if path.parent != tmp_path / "out":
            path.parent.rmdir()
    make_output(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["a.txt", "manifest.json"]


def test_what_is_written_into_the_folder_meanwhile_is_kept(tmp_path):
    written = storage.atomic_folder(tmp_path / "out", kind="tokens")
    written.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("saved just now")
    with pytest.raises(NotAllowed):
        written.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/thesis.tex").read_text() == "saved just now"


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("here", "is the current folder"),
        ("here/..", "a parent of the current folder"),
        ("home", "a home folder"),
        ("home/..", "a parent of"),
        ("repository", "the root of a repository"),
        ("data-repository", "the root of a repository"),
        ("link", "is the current folder"),
        ("link/link-to-home", "a home folder"),
        ("loop", "leads nowhere"),
    ],
)
def test_a_folder_that_must_stay_is_refused_also_behind_links(tmp_path, monkeypatch, where, says, private):
    for name in ("here", "home", "repository/.git", "data-repository/.dvc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("here")
    (tmp_path / "here/link-to-home").symlink_to(tmp_path / "home")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert_refused(tmp_path / where, says, kind="", private=private)
    make_output(tmp_path / "new")  # what is refused depends on the place alone


@pytest.mark.parametrize("place", ["/", "/proc"])
def test_the_root_and_a_mount_point_are_refused(place):
    with pytest.raises(NotAllowed, match="which is never replaced"):
        storage.replaceable(Path(place), lambda _: True)


def test_a_link_to_an_earlier_output_stays_a_link(tmp_path):
    make_output(tmp_path / "big disk/out")
    (tmp_path / "out").symlink_to("big disk/out")
    make_output(tmp_path / "out", content="newer")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big disk/out/a.txt").read_text() == "newer"
    assert names(tmp_path / "big disk") == ["out"]


def test_state_of_our_own_is_replaced_though_it_is_damaged(tmp_path):
    make_output(tmp_path / "state", kind="state")
    (tmp_path / "state/manifest.json").write_bytes(b"")
    make_output(tmp_path / "state", kind="state", private=True)
    assert storage.verified_manifest(tmp_path / "state")["kind"] == "state"


def test_every_writer_of_a_folder_names_its_kind():
    root = Path(__file__).parents[2]
    for path in [*root.glob("src/**/*.py"), *root.glob("stages/*.py"), root / "benchmarks/tokenization.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "atomic_folder":
                assert "kind" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


@pytest.fixture
def folder(tmp_path):
    with storage.atomic_folder(tmp_path / "out") as temporary:
        storage.write_text(temporary / "a.txt", "aaaa")
        storage.write_text(temporary / "b.txt", "bbbb")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "a.txt").write_text("aaab"), r"a\.txt was altered"),
        (lambda folder: (folder / "a.txt").write_text("aaa"), r"a\.txt has 3 bytes where 4 were written"),
        (lambda folder: (folder / "a.txt").unlink(), r"a\.txt is missing"),
        (lambda folder: (folder / "c.txt").write_text("c"), r"c\.txt is not in the manifest"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), r"manifest\.json names no files"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json is no valid JSON"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder, damage, says):
    damage(folder)
    with pytest.raises(BadData, match=says):
        storage.verified_manifest(folder)


def test_a_missing_folder_says_what_makes_it(tmp_path):
    with pytest.raises(MissingInput, match="dvc repro"):
        storage.verified_manifest(tmp_path / "nothing")
    with pytest.raises(MissingInput, match="dvc repro"):
        storage.verify_file(tmp_path / "nothing", "00")


def test_json_is_one_text_for_one_value():
    assert storage.json_bytes({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_json_of_ours_holds_what_is_no_number(value, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.json_bytes({"loss": value})
    (tmp_path / "a.json").write_text(json.dumps({"loss": value}))
    with pytest.raises(BadData, match="is no valid JSON"):
        storage.read_json(tmp_path / "a.json")
    assert not storage.all_finite({"a": [1.0, (value,)]})
    assert storage.all_finite({"a": [1.0, 2, "x", None]})
