"""Durability code without one of its lines: for each such mutant one of the tests above it turns red.

A mutant is applied in a fork, to the code objects of the imported module, so that every importer runs it;
then the named check runs there. It passes on the code as it is, as the last test here says. `make test` tries
some, `make test-faults` all.
"""

import importlib
import inspect
import os
import shutil
import sys
import types
from dataclasses import dataclass

import pytest

from tests import forks, test_crashes, test_ledger, test_storage

ALL = "TEST_FAULTS" in os.environ


@dataclass(frozen=True)
class Mutant:
    """A text of a module, what stands there instead, and what must turn red."""

    module: str
    old: str
    new: str
    check: str  # name of a function below, and after a colon its argument

    def __str__(self):
        return f"{self.module.rpartition('.')[2]}: {self.old.strip().splitlines()[0]} ({self.check})"


def crashes(place, name):
    test_crashes.prepare(place, name)
    test_crashes.tried(place, *test_crashes.PROTOCOLS[name])


def storage_test(place, name):
    place.mkdir(exist_ok=True)
    getattr(test_storage, name)(place)


def altered_file(place, damage):
    """A folder that was altered is refused."""
    with test_storage.storage.atomic_folder(place / "out") as temporary:
        (temporary / "a.txt").write_bytes(b"aaaa")
        (temporary / "b.txt").write_bytes(b"bbbb")
    changes = {
        "changed": lambda: (place / "out/a.txt").write_bytes(b"aaab"),
        "longer": lambda: (place / "out/a.txt").write_bytes(b"aaaaa"),
        "added": lambda: (place / "out/c.txt").write_bytes(b"c"),
        "gone": lambda: (place / "out/b.txt").unlink(),
    }
    changes[damage]()
    says = {
        "changed": "was altered",
        "longer": "has 5 bytes",
        "added": "is not in",
        "gone": "b.txt is missing",
    }
    with pytest.raises(test_storage.BadData, match=says[damage]):
        test_storage.storage.verified_manifest(place / "out")


def refused(place, number):
    """A disk that fails at a write is a sentence, and the old file stays."""
    from compactgpt import storage
    from compactgpt.errors import DiskFailed, DiskFull
    from tests.disk import Fault

    storage.write_text(place / "a.txt", "old")
    with (
        pytest.raises(DiskFull if number == "full" else DiskFailed),
        Fault(place, 2, number),
    ):  # mkdir, create, write
        storage.write_text(place / "a.txt", "new")
    assert (place / "a.txt").read_text() == "old"
    assert [path.name for path in place.iterdir()] == ["a.txt"]


def folder_stays(place, _):
    """A folder whose successor can't take its place stands where it was."""
    from compactgpt import storage

    test_crashes.make_folder(place, "old")
    real, renames = os.rename, []

    def rename(a, b):
        renames.append(b)
        if len(renames) == 2:
            raise OSError(5, "refused")
        real(a, b)

    os.rename = rename
    with pytest.raises(storage.DiskFailed):
        test_crashes.make_folder(place, "new")
    assert test_crashes.found_name(place / "in/out") == "old"


def ledger_kill(place, stop):
    test_ledger.run(place / "plain", place / "expected")
    expected = test_ledger.published(place / "expected")
    test_ledger.test_what_a_kill_left_half_written_is_cut_off(place, expected, int(stop))


def ledger_torn(place, _):
    test_ledger.run(place / "plain", place / "expected")
    expected = test_ledger.published(place / "expected")
    test_ledger.test_a_line_that_lacks_its_end_alone_is_torn_and_what_is_kept_is_kept_again(place, expected)


def ledger_damage(place, name):
    test_ledger.run(place / "plain", place / "expected")
    expected = test_ledger.published(place / "expected")
    test_ledger.test_a_damaged_piece_is_named_and_made_again(place, expected, name, False)


def ledger_lie(place, _):
    test_ledger.run(place / "plain", place / "expected")
    test_ledger.test_a_journal_that_lies_is_not_believed(place, test_ledger.published(place / "expected"))


def shard_damage(place, _):
    """A kept shard that was altered is made again."""
    test_crashes.download(place / "whole", lambda: None)
    expected = test_crashes.tokens_of(place / "whole/documents")
    real = shutil.rmtree
    shutil.rmtree = lambda path, **settings: None if path == place / "state" else real(path, **settings)
    test_crashes.download(place, lambda: None)
    shutil.rmtree = real
    for path in place.glob("state/*/*.parquet"):
        content = path.read_bytes()
        path.unlink()  # it is linked into the folder
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    test_crashes.download(place, lambda: None)
    assert test_crashes.tokens_of(place / "documents") == expected


def two_at_once(place, _):
    """The second to take a stage's lock is told."""
    from compactgpt.errors import Busy
    from stages import door

    os.chdir(place)
    with door._only_one("training"), pytest.raises(Busy), door._only_one("training"):
        pass


def two_syncers(place, _):
    from compactgpt.tracking.run_folder import RunFolder

    folder = RunFolder(place / "a/b/c/d")
    folder.path.mkdir(parents=True)
    with folder.locked() as first, folder.locked() as second:
        assert (first, second) == (True, False)


def torn_line(place, _):
    """A line that the disk took in part spoils neither its neighbours nor the next run."""
    from compactgpt.tracking import journal as journals
    from tests.disk import Fault

    journal = journals.Journal(place, "training", {"tags": {}})
    with pytest.raises(OSError), Fault(place, 0, "broken"):
        journal.metrics({"loss": 3.0}, 1)
    journal.metrics({"loss": 2.0}, 2)
    journal.end("FINISHED")
    path = journal.folder / "journal.jsonl"
    kinds = [line["kind"] for line in journals.journal_lines(path.read_bytes())]
    assert kinds == ["start", "metrics", "end"]
    assert journals._last_steps(place / "tracking", journal.folder.name) == {"loss": 2}


def half_line(place, _):
    """A system call that takes a part of a line gets the rest."""
    from compactgpt.tracking import journal as journals

    real = os.write
    os.write = lambda handle, content: real(handle, content[:7])
    journals.Journal(place, "training", {"tags": {}}).end("FINISHED")
    os.write = real
    (path,) = place.glob("tracking/*/*/journal.jsonl")
    assert [line["kind"] for line in journals.journal_lines(path.read_bytes())] == ["start", "end"]


def lost_start(place, _):
    """A journal that a power loss left as zeros stops no other one from being copied."""
    from compactgpt.tracking.run_folder import run_folders

    for name, content in [("a", b"\0" * 50 + b"\n"), ("b", b'{"kind": "start"}\n'), ("c", b"")]:
        path = place / ".state/tracking" / name / name / "journal.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert [folder.path.name for folder in run_folders(place)] == ["b"]


def other_run(place, what):
    """A state of another run, or of another step than its name says, is passed over."""
    from compactgpt import checkpoint, storage

    own = {"run_key": "k", "step": 2} | ({"run_key": "other"} if what == "run" else {"step": 3})
    with storage.atomic_folder(place / "step-00000002", own) as temporary:
        storage.write_json(temporary / "progress.json", {"step": 2})
    with pytest.raises(checkpoint.BadData):
        checkpoint.checked_state(place / "step-00000002", "k")


def leftovers(place, _):
    """Half a state of a killed run is swept; two whole ones are kept."""
    from compactgpt import checkpoint, storage

    (place / ".step-00000004.1.tmp").mkdir(parents=True)
    for step in (1, 2, 3):
        with storage.atomic_folder(place / f"step-{step:08d}", {"run_key": "k", "step": step}):
            pass
    checkpoint.drop_old(place)
    found = [path.name for path in checkpoint.swept_states(place)]
    assert found == ["step-00000003", "step-00000002"]
    assert sorted(path.name for path in place.iterdir()) == sorted(found)


S, L, C, T = (f"compactgpt.{name}" for name in ("storage", "ledger", "checkpoint", "tracking.journal"))
MUTANTS = [
    Mutant(
        S,
        "                os.fsync(file.fileno())\n            os.replace",
        "            os.replace",
        "crashes:file",
    ),
    Mutant(
        S,
        "                file.flush()\n                os.fsync",
        "                os.fsync",
        "crashes:file",
    ),
    Mutant(
        S,
        "            os.replace(temporary, path)\n            fsync_folder(path.parent)",
        "            os.replace(temporary, path)",
        "crashes:file",
    ),
    Mutant(
        S,
        "            os.replace(temporary, path)",
        "            shutil.copyfile(temporary, path)",
        "crashes:file",
    ),
    Mutant(S, "        fsync_folder(made.parent)", "        pass", "crashes:file"),
    Mutant(S, "reversed(missing)", "missing[:1]", "crashes:file"),
    Mutant(
        S,
        '                with open(path, "rb") as file:\n                    os.fsync(file.fileno())\n',
        "",
        "crashes:folder",
    ),
    Mutant(S, "                fsync_folder(inner)", "                pass", "crashes:folder"),
    Mutant(S, "    os.fsync(handle)", "    pass", "crashes:folder"),
    Mutant(
        S, "    fsync_folder(folder.parent)\n    shutil.rmtree(old", "    shutil.rmtree(old", "crashes:folder"
    ),
    Mutant(
        S,
        "        os.rename(temporary, folder)\n",
        "        shutil.copytree(temporary, folder)\n",
        "crashes:replaced folder",
    ),
    Mutant(S, "        os.rename(folder, old)", "        shutil.rmtree(folder)", "crashes:replaced folder"),
    Mutant(S, "        with suppress(OSError):\n            os.rename(old, folder)\n", "", "folder_stays:"),
    Mutant(S, "    if actual != sha256:", "    if False:", "altered_file:changed"),
    Mutant(S, "size is not None and path.stat().st_size != size", "False", "altered_file:longer"),
    Mutant(S, "sorted(found ^ set(named))", "sorted(set(named) - found)", "altered_file:added"),
    Mutant(S, "sorted(found ^ set(named))", "sorted(found - set(named))", "altered_file:gone"),
    Mutant(S, "        if error.errno == errno.EIO:", "        if False:", "refused:broken"),
    Mutant(S, "if error.errno not in _NO_ROOM", "if True", "refused:full"),
    Mutant(S, "            temporary.unlink(missing_ok=True)", "            pass", "refused:full"),
    Mutant(
        S,
        "            shutil.rmtree(left, ignore_errors=True)",
        "            pass",
        "storage_test:test_what_a_killed_process_left_is_swept_and_nothing_else",
    ),
    Mutant(
        S,
        "or _is_alive(int(match[1]))",
        "",
        "storage_test:test_what_a_killed_process_left_is_swept_and_nothing_else",
    ),
    Mutant(L, "    file.truncate(size)\n", "", "ledger_kill:5"),
    Mutant(L, ' and line.endswith(b"\\n")', "", "ledger_torn:"),
    Mutant(
        L,
        "(ValueError, KeyError, TypeError, RecursionError, OSError):\n            return state",
        "KeyError:\n            return state",
        "ledger_kill:3",
    ),
    Mutant(L, "        if not whole:", "        if False:", "ledger_damage:train.tokens"),
    Mutant(L, "after.pieces == state.pieces + 1", "True", "ledger_lie:"),
    Mutant(L, "        file.writelines(lines)", "        pass", "ledger_torn:"),
    Mutant("compactgpt.corpus", '        verify_file(path, note["sha256"])', "        pass", "shard_damage:"),
    Mutant(
        C,
        "        manifest = verified_manifest(state)",
        "        manifest = read_json(state / 'manifest.json')",
        "state_damage:",
    ),
    Mutant(C, 'manifest["run_key"] == run_key', "True", "other_run:run"),
    Mutant(C, "state.name == f\"step-{manifest['step']:08d}\"", "True", "other_run:step"),
    Mutant(C, "    return _states(folder)[::-1]", "    return _states(folder)", "leftovers:"),
    Mutant(C, "        shutil.rmtree(leftover)", "        pass", "leftovers:"),
    Mutant(C, "[:-KEPT_STATES]", "[:]", "leftovers:"),
    Mutant(
        T,
        "line[os.write(self._file, line) :]",
        "line[os.write(self._file, line) + len(line) :]",
        "half_line:",
    ),
    Mutant(T, 'b"\\n" + line if self._torn else line', "line", "torn_line:"),
    Mutant(
        T,
        "        with suppress(ValueError, RecursionError):\n            lines.append",
        "        if True:\n            lines.append",
        "torn_line:",
    ),
    Mutant(T, "        os.fsync(self._file)\n", "", "crashes:journal"),
    Mutant(T, "        fsync_folder(self.folder)\n", "", "crashes:journal"),
    Mutant(T, 'raw[: raw.rfind(b"\\n") + 1]', "raw", "cut_line:"),
    Mutant(
        "compactgpt.tracking.run_folder",
        "return [folder for folder in found if first_line(folder)]",
        "return found",
        "lost_start:",
    ),
    Mutant(
        "compactgpt.tracking.run_folder",
        "                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "                pass",
        "two_syncers:",
    ),
    Mutant(
        "stages.door",
        "            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        "two_at_once:",
    ),
]
TRIED = MUTANTS if ALL else MUTANTS[::4]


def state_damage(place, _):
    """A state whose file was altered is refused."""
    from compactgpt import checkpoint, storage

    with storage.atomic_folder(place / "step-00000002", {"run_key": "k", "step": 2}) as temporary:
        storage.write_json(temporary / "progress.json", {"step": 2})
    (place / "step-00000002/progress.json").write_text('{\n  "step": 1\n}\n')
    with pytest.raises(checkpoint.BadData):
        checkpoint.checked_state(place / "step-00000002", "k")


def cut_line(place, _):
    """A line without its end is not there yet, even where it would be JSON."""
    from compactgpt.tracking import journal as journals

    assert journals.journal_lines(b'{"kind": "a"}\n{"kind": "b"}') == [{"kind": "a"}]


def apply(mutant):
    """Give every function of the module the code that it would have."""
    module = importlib.import_module(mutant.module)
    source = inspect.getsource(module)
    assert source.count(mutant.old) == 1, f"{mutant} is not there once"
    changed = 0
    codes = [compile(source.replace(mutant.old, mutant.new), module.__file__, "exec")]
    while codes:
        for code in (each for each in codes.pop().co_consts if isinstance(each, types.CodeType)):
            codes.append(code)
            function = module
            for name in code.co_qualname.split("."):
                function = getattr(function, name, None)
            function = inspect.unwrap(function.fget if isinstance(function, property) else function)
            if inspect.isfunction(function) and function.__code__ != code:
                function.__code__ = code
                changed += 1
    assert changed, f"{mutant} changes no function"


def run_check(check, place, mutant=None):
    """For forks: exit code 0 is green, 3 red."""
    for handle in (1, 2):
        os.dup2(os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    if mutant:
        apply(mutant)
    name, _, argument = check.partition(":")
    place.mkdir()
    try:
        globals()[name](place, argument)
    except (Exception, pytest.fail.Exception) as error:
        sys.stdout.write(repr(error)[:300])
        sys.exit(3)


def warm_up():
    for name in ("tracking.run_folder", "checkpoint", "corpus", "documents"):
        importlib.import_module(f"compactgpt.{name}")
    importlib.import_module("stages.door")
    importlib.import_module("pyarrow.parquet")


@pytest.fixture(scope="module")
def zygote():
    server = forks.Zygote(warm_up)
    yield server
    server.close()


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


@pytest.mark.parametrize("mutant", TRIED, ids=str)
def test_a_mutant_of_the_durability_code_turns_a_test_red(zygote, place, mutant, counted):
    code = zygote.run(run_check, mutant.check, place, mutant)
    assert code == 3, f"{mutant} survives: exit code {code}\n" + place.with_suffix(".log").read_text()[-2000:]
    counted["mutants of the durability code found"] += 1


@pytest.mark.parametrize("check", sorted({mutant.check for mutant in TRIED}))
def test_the_code_as_it_is_stays_green(zygote, place, check):
    assert zygote.run(run_check, check, place) == 0, place.with_suffix(".log").read_text()
