"""Files that grow piece by piece come out the same, wherever they were cut or altered in between."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from compactgpt.data import HEADER_BYTES, index_path, open_tokens, write_tokens
from compactgpt.ledger import COLUMNS, JOURNAL, SPLITS, Piece, open_ledger, piece_sha256, write_index

HEADER = {"vocab_size": 300, "eot_token": 299, "tokenizer_sha256": "ab" * 32}
# (16-byte id, length of the text, tokens) of each document of each split of each piece
PIECES = [
    {split: [(bytes([n, len(split)] * 8), n + 1, list(range(n)))] * (n % 3) for split in SPLITS}
    for n in range(1, 6)
]


def make_piece(documents, spill=None):
    columns = {}
    for split in SPLITS:
        rows = documents[split]
        tokens = np.array([token for row in rows for token in [*row[2], 299]], "<u2").tobytes()
        if spill and tokens:
            path = spill / f"{split}.spill"
            path.write_bytes(tokens)
            tokens = path
        lengths = np.array([len(row[2]) + 1 for row in rows], "<i8").tobytes()
        sizes = np.array([row[1] for row in rows], "<i8").tobytes()
        ids = b"".join(row[0] for row in rows)
        columns[split] = dict(zip(COLUMNS, [tokens, lengths, sizes, ids], strict=True))
    return Piece(columns, piece_sha256(columns), sum(row[1] for rows in documents.values() for row in rows))


def run(folder, out, stop_after=None, spill=None):
    """Go on where the folder stands; return how many pieces were made, and the sentence about damage."""
    out.mkdir(exist_ok=True)
    with open_ledger(folder) as ledger:
        first = ledger.state.pieces
        for documents in PIECES[first:stop_after]:
            ledger.add(make_piece(documents, spill))
        if stop_after is None:
            for split in SPLITS:
                (out / f"{split}.tokens").unlink(missing_ok=True)
                ledger.publish(out, split, HEADER)
        return ledger.state.pieces - first, ledger.damaged


def published(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def expected(tmp_path):
    for split in SPLITS:
        documents = [(row[0], row[1], np.array(row[2], int)) for piece in PIECES for row in piece[split]]
        write_tokens(tmp_path / "plain" / f"{split}.tokens", documents, **HEADER)
    return published(tmp_path / "plain")


def test_the_files_are_those_of_the_plain_writer(tmp_path, expected):
    assert run(tmp_path / "state", tmp_path / "out") == (5, "")
    assert published(tmp_path / "out") == expected
    split = open_tokens(tmp_path / "out" / "train.tokens")
    assert [split.document(n).tolist() for n in range(3)] == [[0], [0, 1], [0, 1]]


def test_long_columns_come_by_file_and_the_file_goes(tmp_path, expected):
    run(tmp_path / "state", tmp_path / "out", spill=tmp_path)
    assert published(tmp_path / "out") == expected
    assert not list(tmp_path.glob("*.spill"))


@pytest.mark.parametrize("stop", range(6))
def test_a_stopped_run_goes_on(tmp_path, expected, stop):
    run(tmp_path / "state", tmp_path / "out", stop_after=stop)
    assert run(tmp_path / "state", tmp_path / "out") == (5 - stop, "")
    assert published(tmp_path / "out") == expected
    # Killed after publishing, before the state was deleted:
    assert run(tmp_path / "state", tmp_path / "out") == (0, "")
    assert published(tmp_path / "out") == expected


@pytest.mark.parametrize("stop", [3, 5])
def test_what_a_kill_left_half_written_is_cut_off(tmp_path, expected, stop):
    state = tmp_path / "state"
    run(state, tmp_path / "out", stop_after=stop)
    for path in state.iterdir():
        path.write_bytes(path.read_bytes() + (b'{"pieces":4,' if path.name == JOURNAL else b"half"))
    assert run(state, tmp_path / "out") == (5 - stop, "")
    assert published(tmp_path / "out") == expected


def test_a_line_that_lacks_its_end_alone_is_torn_and_what_is_kept_is_kept_again(tmp_path, expected):
    state = tmp_path / "state"
    run(state, tmp_path / "out", stop_after=4)
    (state / JOURNAL).write_bytes((state / JOURNAL).read_bytes()[:-1])
    assert run(state, tmp_path / "out", stop_after=3)[0] == 0
    assert run(state, tmp_path / "out", stop_after=5) == (2, "")
    assert run(state, tmp_path / "out") == (0, "")
    assert published(tmp_path / "out") == expected


@pytest.mark.parametrize("name", [f"{split}.{column}" for split in SPLITS for column in COLUMNS])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_piece_is_named_and_made_again(tmp_path, expected, name, cut):
    state = tmp_path / "state"
    run(state, tmp_path / "out", stop_after=4)
    raw = bytearray((state / name).read_bytes())
    raw[-1] ^= 1
    (state / name).write_bytes(raw[:-1] if cut else raw)
    made, damaged = run(state, tmp_path / "out")
    assert made == 2  # piece 4 and the one that had not been made
    assert damaged.startswith("piece 4 in ")
    assert damaged.endswith("was altered: made again")
    assert published(tmp_path / "out") == expected


def nothing(size):
    """A piece of no bytes, after which every file has another size, or one that is no whole number."""
    sizes = {split: dict.fromkeys(COLUMNS, size) for split in SPLITS}
    line = {"pieces": 1, "sizes": sizes, "text_bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    return json.dumps(line) + "\n"


def test_a_journal_that_lies_is_not_believed(tmp_path, expected):
    state = tmp_path / "state"
    run(state, tmp_path / "out", stop_after=4)
    lines = (state / JOURNAL).read_text().splitlines(keepends=True)
    (state / JOURNAL).write_text("".join([lines[0], lines[2], lines[3]]))
    assert run(state, tmp_path / "out")[0] == 4
    assert published(tmp_path / "out") == expected
    run(tmp_path / "more", tmp_path / "out", stop_after=4)
    journal = tmp_path / "more" / JOURNAL
    journal.write_text(journal.read_text().replace('"pieces":4', '"pieces":5'))  # one was never made
    assert run(tmp_path / "more", tmp_path / "out")[0] == 2
    assert published(tmp_path / "out") == expected
    for lie in (
        "".join(lines).replace(f'"tokens":{HEADER_BYTES}', '"tokens":-1'),
        "".join(lines).replace('"sha256"', '"sha"'),
        "[" * 100_000 + "\n",
        nothing(float(HEADER_BYTES)),
        nothing(-HEADER_BYTES),
    ):
        run(state, tmp_path / "out")
        (state / JOURNAL).write_text(lie)
        run(state, tmp_path / "out")
        assert published(tmp_path / "out") == expected


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**40)), max_size=40))
@settings(deadline=None)
def test_an_index_is_what_safetensors_would_write(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("index")
    lengths, sizes = (
        np.array(column, np.int64) for column in (zip(*rows, strict=True) if rows else ((), ()))
    )
    ids = np.arange(16 * len(rows), dtype=np.uint8).reshape(-1, 16)
    for name, column in [("lengths", lengths), ("bytes", sizes), ("ids", ids)]:
        (folder / name).write_bytes(column.tobytes())
    write_index(index_path(folder / "a.tokens"), *(folder / name for name in ("lengths", "bytes", "ids")))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    assert (folder / "a.index.safetensors").read_bytes() == save(
        {"offsets": offsets, "bytes": sizes, "ids": ids}
    )
