"""Whatever interrupts a training run, at whichever of its writes: the next run ends with the same bytes."""

import errno
import itertools
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import forks
import pytest
import torch
from test_training import make_tokens, params_of

from compactgpt import training
from compactgpt.checkpoint import drop_states
from compactgpt.errors import DiskFailed, DiskFull

# Everything in a run that changes the disk, but for writes into files that are still being made.
WRITES = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]

# One write in so many is tried; EVERY_WRITE=1 tries them all, which takes minutes (`make test-faults`).
STRIDE = 1 if os.environ.get("EVERY_WRITE") else 7


class Fault:
    """Calls `strike` instead of the write number `at`, counted from 0; knows how many writes there were."""

    def __init__(self, at, strike):
        self.at, self.strike, self.writes, self.struck = at, strike, 0, False

    def __enter__(self):
        self.real = [(module, name, getattr(module, name)) for module, name in WRITES]
        for module, name, real in self.real:
            setattr(module, name, self._guarded(real))
        return self

    def __exit__(self, *_):
        for module, name, real in self.real:
            setattr(module, name, real)

    def _guarded(self, real):
        def call(*args, **kwargs):
            self.writes += 1
            if self.writes == self.at + 1:
                self.struck = True
                self.strike()
            return real(*args, **kwargs)

        return call


def whole_run(tokens, folder):
    """What the stage's door does: train, write the results, drop the states."""
    params, splits = params_of(max_steps=4, eval_windows=2), training.open_splits(tokens)
    states = folder / "states"
    trained = training.train(params, splits, states)
    training.save_results(params, splits, trained, states, folder / "model", folder / "loss.csv")
    drop_states(states)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def struck_run(tokens, folder, at):
    with Fault(at, kill):
        whole_run(tokens, folder)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the configuration of these tests says, and as the forks have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place():
    """A folder in memory where there is one: a disk takes its time to sync."""
    shared = Path("/dev/shm")
    folder = (shared if os.access(shared, os.W_OK) else Path("/tmp")) / f"compactgpt-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tokens(place):
    return make_tokens(place / "tokens")


@pytest.fixture(scope="module")
def whole(tokens, place):
    """The bytes of a run that nothing interrupts, and the number of its writes."""
    with Fault(-1, kill) as fault:
        whole_run(tokens, place / "whole")
    return contents(place / "whole"), fault.writes


@pytest.mark.slow
def test_sigkill_at_any_write_changes_no_byte_of_the_result(tokens, place, whole):
    expected, writes = whole
    assert writes > 30
    for at in itertools.count(0, STRIDE):
        folder = place / f"killed-{at}"
        ended = forks.run(struck_run, tokens, folder, at)
        if ended == 0:  # there are no more writes to be killed at; the first process may have had a few more
            assert at > writes - 3 - STRIDE
            break
        assert ended == -signal.SIGKILL
        whole_run(tokens, folder)
        assert contents(folder) == expected, at
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, DiskFailed)])
def test_a_disk_that_refuses_any_write_is_one_sentence_and_the_next_run_ends_the_same(
    tokens, place, whole, number, error
):
    def refuse():
        raise OSError(number, os.strerror(number))

    expected, writes = whole
    for at in range(0, writes, 2 * STRIDE):
        folder = place / f"refused-{at}"
        # Some writes only sweep: then the run goes on.
        with Fault(at, refuse) as fault, suppress(error):
            whole_run(tokens, folder)
        assert fault.struck or at > writes - 3
        whole_run(tokens, folder)
        assert contents(folder) == expected, at
        shutil.rmtree(folder)
