"""Files are written complete or not at all, checked when they are read, and replace no files of the user."""

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from compactgpt.common import storage
from compactgpt.common.errors import BadData, MissingInput, NotAllowed, OutsideFolder


@pytest.fixture
def small_disk():
    """No file of this process may grow beyond 64 KiB: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_output(folder, kind="tokens", content="new", **options):
    with storage.atomic_folder(folder, kind=kind, **options) as temporary:
        storage.write_text(temporary / "a.txt", content)


def write_and_fail(writer, content):
    with writer as target:
        target.write(content) if hasattr(target, "write") else (target / "b.txt").write_bytes(content)
        raise KeyError


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else path.is_symlink() for path in folder.rglob("*")}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_refused(folder, message, **options):
    """Writing an output there is refused, and nothing below the folder's parent changes."""
    before = tree(folder.parent)
    with pytest.raises(NotAllowed, match=message):
        write_output(folder, **options)
    assert tree(folder.parent) == before


def test_an_error_or_a_full_disk_leaves_the_old_file_and_folder(tmp_path, small_disk):
    storage.write_text(tmp_path / "a.txt", "old")
    write_output(tmp_path / "out", content="old")
    before = tree(tmp_path)
    for size, error in ((4, KeyError), (2**17, OSError)):  # the second does not fit on the disk
        for writer in (
            storage.atomic_file(tmp_path / "a.txt"),
            storage.atomic_folder(tmp_path / "out", kind="tokens"),
        ):
            with pytest.raises(error):
                write_and_fail(writer, bytes(size))
    assert tree(tmp_path) == before


def test_leftovers_of_killed_processes_are_deleted_and_no_other_files(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".out.{ended.pid}.compactgpt-tmp").mkdir()
    (tmp_path / f".a.txt.{ended.pid}.compactgpt-tmp").write_text("half")
    kept = [f".out.{os.getppid()}.compactgpt-tmp", f".b.txt.{ended.pid}.compactgpt-tmp", ".out.notes"]
    for name in kept:
        (tmp_path / name).write_text("not ours")
    write_output(tmp_path / "out")
    storage.write_text(tmp_path / "a.txt", "complete")
    assert names(tmp_path) == sorted([*kept, "out", "a.txt"])


def test_the_manifest_has_facts_sizes_and_hashes(tmp_path):
    facts = {"documents": 0}
    with storage.atomic_folder(tmp_path / "out", facts) as folder:
        storage.write_text(folder / "sub" / "a.txt", "héllo")
        facts["documents"] = 3
    digest = hashlib.sha256("héllo".encode()).hexdigest()
    assert storage.verified_manifest(tmp_path / "out") == {
        "documents": 3,
        "files": {"sub/a.txt": {"bytes": 6, "sha256": digest}},
    }


def test_json_has_one_form_and_finite_numbers_only():
    assert storage.json_bytes({"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        storage.json_bytes({"loss": float("inf")})


@pytest.mark.parametrize("name", ["/etc/passwd", "a/../../b", "", "a\0b", "link/a"])
def test_a_path_outside_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/link").symlink_to("..")
    with pytest.raises(OutsideFolder):
        storage.inside(tmp_path / "project", name)
    assert storage.inside(tmp_path / "project", "link/a", follow=False)


def text(content):
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    ("name", "change", "message", "can_overwrite"),
    [
        ("a.txt", text("nex"), r"a\.txt was altered", True),
        ("a.txt", text("ne"), r"a\.txt has 2 bytes, but the manifest lists 3 bytes", True),
        ("a.txt", Path.unlink, r"a\.txt is missing", True),
        ("notes.txt", text("mine"), r"notes\.txt is not in the manifest", False),
        ("sub/link", lambda path: path.symlink_to("nowhere"), "sub/link is not in the manifest", False),
        ("empty", Path.mkdir, "empty is not in the manifest", False),
        ("manifest.json", text("{}"), r"manifest\.json does not list files", False),
        ("manifest.json", text('{"a": NaN}'), r"manifest\.json is not valid JSON \(NaN is not a JSON", False),
    ],
)
def test_a_changed_folder_is_refused_and_only_its_own_files_are_replaced(
    tmp_path, name, change, message, can_overwrite
):
    out = tmp_path / "out"
    with pytest.raises(MissingInput, match="dvc repro"):
        storage.verified_manifest(out)
    for content in ("old", "new"):  # an earlier output is replaced
        write_output(out, content=content)
    assert (names(tmp_path), (out / "a.txt").read_text()) == (["out"], "new")
    assert_refused(out, "did not write", kind="export", overwrite=True)
    (out / name).parent.mkdir(exist_ok=True)
    change(out / name)
    with pytest.raises(BadData, match=message):
        storage.verified_manifest(out)
    refused = "did not write" if name == "manifest.json" else f"{message}.*, so .* was changed"
    assert_refused(out, refused)
    if can_overwrite:
        write_output(out, overwrite=True)
        storage.verified_manifest(out)
    else:
        assert_refused(out, refused, overwrite=True)


def test_other_files_and_the_current_folder_are_refused(tmp_path, monkeypatch):
    thesis = tmp_path / "papers/thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("five years")
    assert_refused(thesis.parent, r"papers has files that this command did not write", overwrite=True)
    assert_refused(thesis, "thesis.tex is a file")
    (thesis.parent / "manifest.json").write_text('{"files": {}}')  # of another tool
    assert_refused(thesis.parent, "did not write", overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "here", tmp_path):
        assert_refused(folder, "has the current folder in it", force=True)


def test_files_that_appear_in_the_folder_meanwhile_are_kept(tmp_path):
    writing = storage.atomic_folder(tmp_path / "out", kind="tokens")
    writing.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("saved just now")
    with pytest.raises(NotAllowed):
        writing.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_a_link_to_an_earlier_output_stays_a_link(tmp_path):
    write_output(tmp_path / "big disk/out")
    (tmp_path / "out").symlink_to("big disk/out")
    write_output(tmp_path / "out", content="newer")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big disk/out/a.txt").read_text() == "newer"


def test_a_damaged_folder_under_state_is_replaced(tmp_path):
    write_output(tmp_path / "state", kind="state")
    (tmp_path / "state/manifest.json").write_bytes(b"")
    write_output(tmp_path / "state", kind="state", force=True)
    assert storage.verified_manifest(tmp_path / "state")["kind"] == "state"
