"""A power loss at any moment: whatever the disk kept, a reader finds the old or the new, and never an error.

Each protocol is run once, on real files, by the code that the stages use; tests/crashes.py tells the states
that a disk may then hold; each is laid out and read. Once a writer has returned, only the new will do.
"""

import os
import shutil
from itertools import islice

import pytest

from compactgpt import checkpoint, corpus, storage
from compactgpt.corpus import Limits, Origin, collect
from compactgpt.errors import MissingInput
from compactgpt.ledger import SPLITS, open_ledger
from compactgpt.tracking import journal as journals
from tests.crashes import lay_out, states_of
from tests.test_ledger import HEADER, PIECES, make_piece

EACH = {} if "TEST_FAULTS" in os.environ else {"ledger": 5}  # of a long protocol's states one of so many


def tried(place, begin, protocol, read, each=1):
    """Read one state of `each`: `read(folder, marks passed)` asserts what it finds. Returns their number."""
    root = place / "root"
    root.mkdir()
    begin(root)
    count = 0
    for done, passed, tree in islice(states_of(root, protocol), 0, None, each):
        folder = place / "state"
        folder.mkdir()
        lay_out(tree, folder)
        try:
            read(folder, passed)
        except Exception as error:
            listed = {path: content and content[:60] for path, content in sorted(tree.items())}
            raise AssertionError(f"after {done} operations, {passed} parts done: {listed}") from error
        shutil.rmtree(folder)
        count += 1
    shutil.rmtree(root)
    return count


# --- protocols: (what is there before, what is done, what a reader must find)


def old_file(root):
    storage.write_text(root / "a.txt", "old")


def write_file(root, done):
    storage.write_text(root / "a.txt", "new and longer")
    done()
    storage.write_json(root / "not/yet/there.json", {"a": 1})
    done()


def read_file(folder, passed):
    assert (folder / "a.txt").read_text() in (["new and longer"] if passed else ["old", "new and longer"])
    if (folder / "not/yet/there.json").exists() or passed == 2:
        assert storage.read_json(folder / "not/yet/there.json") == {"a": 1}


def make_folder(root, name):
    with storage.atomic_folder(root / "in/out", {"name": name}) as temporary:
        storage.write_text(temporary / "deep/er/a.txt", name)
        (temporary / "b.bin").write_bytes(name.encode() * 9)
        (temporary / "deep/c.txt").write_text(name)


def found_name(folder):
    """Which whole folder is there; nothing where none is."""
    try:
        name = storage.verified_manifest(folder)["name"]
    except MissingInput:
        return ""
    assert (folder / "deep/er/a.txt").read_text() == name
    return name


def new_folder(root, done):
    make_folder(root, "new")
    done()


def read_new_folder(folder, passed):
    assert found_name(folder / "in/out") in (["new"] if passed else ["", "new"])
    make_folder(folder, "again")  # what was left stands in nobody's way
    assert found_name(folder / "in/out") == "again"


def read_replaced_folder(folder, passed):
    assert found_name(folder / "in/out") in (["new"] if passed else ["", "old", "new"])


def grow(root, done):
    """What tokenization does: pieces, then both splits in a folder, then the state goes."""
    with open_ledger(root / "state") as ledger:
        for documents in PIECES[ledger.state.pieces :]:
            ledger.add(make_piece(documents))
        with storage.atomic_folder(root / "tokens") as temporary:
            for split in SPLITS:
                ledger.publish(temporary, split, HEADER)
    done()
    shutil.rmtree(root / "state")


def tokens_of(folder):
    storage.verified_manifest(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_grown(folder, passed):
    expected = read_grown.expected
    if (folder / "tokens").exists() or passed:
        assert tokens_of(folder / "tokens") == expected
    grow(folder, lambda: None)
    assert tokens_of(folder / "tokens") == expected


class Texts:
    """A corpus of thirty texts."""

    name, identity, parts, lengths = "texts", 1, [Origin("texts")], range(1, 1000)
    at = 0

    def read(self, place):
        for self.at in range((place or 0) + 1, 31):
            yield corpus.Piece(f"text {self.at} " * 9, f"text:{self.at}", 0)

    def place(self):
        return self.at


def download(root, done):
    collect(Texts(), root / "documents", Limits(800), state=root / "state")
    done()


def read_downloaded(folder, passed):
    expected = read_downloaded.expected
    if (folder / "documents").exists() or passed:
        assert tokens_of(folder / "documents") == expected
    download(folder, lambda: None)
    assert tokens_of(folder / "documents") == expected


def save_states(root, done):
    """Three states of a run, of which two are kept; then the model, and the states go."""
    for step in (1, 2, 3):
        with storage.atomic_folder(
            root / f"run/step-{step:08d}", {"run_key": "k", "step": step}
        ) as temporary:
            checkpoint._write_tensors(temporary / "model.safetensors", {"a": read_states.tensor * step})
            storage.write_json(temporary / "progress.json", {"step": step})
        checkpoint.drop_old(root / "run")
        done()
    make_folder(root, "model")
    checkpoint.drop_states(root / "run")


def newest_state(folder):
    for state in checkpoint.swept_states(folder):
        try:
            step, progress = checkpoint.checked_state(state, "k")
        except (MissingInput, checkpoint.BadData):
            continue
        assert progress == {"step": step}
        return step
    return 0


def read_states(folder, passed):
    if found_name(folder / "in/out") == "":
        assert newest_state(folder / "run") in (passed, min(passed + 1, 3))
    newest_state(folder / "run")


def tell(root, done):
    """A run's journal: what it says of itself, two steps, a torn line that was refused, the end."""
    journal = journals.Journal(root, "training", {"tags": {}})
    for step in (1, 2):
        journal.metrics({"loss": 1.0 / step}, step)
    tell.name = journal.folder.name
    journal.end("FINISHED")
    done()


def read_journal(folder, passed):
    kinds = ["start", "metrics", "metrics", "end"]
    for path in folder.glob("tracking/*/*/journal.jsonl"):
        told = [line["kind"] for line in journals.journal_lines(path.read_bytes())]
        assert told == kinds if passed else told == kinds[: len(told)]
    assert not passed or list(folder.glob("tracking/*/*/journal.jsonl"))
    steps = journals._last_steps(folder / "tracking", tell.name)
    assert steps in ({}, {"loss": 1}, {"loss": 2})


def nothing(root):
    pass


PROTOCOLS = {
    "file": (old_file, write_file, read_file),
    "folder": (nothing, new_folder, read_new_folder),
    "replaced folder": (lambda root: make_folder(root, "old"), new_folder, read_replaced_folder),
    "ledger": (nothing, grow, read_grown),
    "corpus": (nothing, download, read_downloaded),
    "states": (nothing, save_states, read_states),
    "journal": (nothing, tell, read_journal),
}


def prepare(place, name):
    """What a reader compares with: the result of a run that nothing disturbs."""
    if name == "ledger":
        grow(place / "whole", lambda: None)
        read_grown.expected = tokens_of(place / "whole/tokens")
    if name == "corpus":
        download(place / "whole", lambda: None)
        read_downloaded.expected = tokens_of(place / "whole/documents")
    if name == "states":
        import torch

        read_states.tensor = torch.ones(3)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_whatever_a_power_loss_leaves_is_read_as_old_or_new(tmp_path, name, counted):
    prepare(tmp_path, name)
    states = tried(tmp_path, *PROTOCOLS[name], EACH.get(name, 1))
    counted["states of the disk after a power loss"] += states
    assert states > 10
