"""Each stage, killed, stopped or refused by a full disk at one of its changes to the folder, and run again.

The interrupted run leaves each output as it was or as it will be, and the next run ends with the bytes of an
uninterrupted one. `make test` tries some moments of the stages that start quickly, `make test-robustness`
more moments of all of them.
"""

import io
import os
import re
import resource
import shutil
import signal
import sys
from contextlib import closing

import pytest

from compactgpt.common.errors import Busy, DiskFull
from tests.support.processes import ForkServer
from tests.support.tiny_pipeline import STAGES, make_place, outs_of, run_stage, warm_up, write_inputs

QUICK = ("estimate", "download", "tokenization", "training", "baseline@unigram")
WAYS = ("kill", "stop", "full disk")
STOPPED = 143  # exit code of a stage after SIGTERM
FULL_AT_BYTES = 64  # a larger file finds the disk full
# Two equal runs may differ in journals, locks, and the times in Great Expectations' pages.
NOT_COMPARED = re.compile(r"\.state/(tracking|locks)/|data/data_docs/")
CURVE = "reports/loss.csv"  # written again after each validation, for `dvc plots show`
LEFTOVER = re.compile(r"\.[0-9]+\.compactgpt-(tmp|old)(/|$)")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def interrupt(way):
    if way == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGTERM)


def run_interrupted(stage, place, log, way="kill", at=-1):
    """Run a stage and interrupt it before its change number `at` in the folder; -1: never. For forks.

    Python reports an audit event for each file opened for writing, renamed, removed or linked, and for each
    folder created or removed. `log` gets what the stage prints, `log`.changes the number of changes.
    """
    changes = 0

    def count(event, args):
        nonlocal changes
        is_opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (is_opened or event in CHANGES) or not isinstance(args[0], str | os.PathLike):
            return
        if os.path.abspath(args[0]).startswith(str(place)):  # noqa: PTH100  it follows no link
            changes += 1
            if changes == at + 1:
                interrupt(way)

    printed = sys.stdout = sys.stderr = io.StringIO()
    sys.addaudithook(count)
    try:
        run_stage(stage, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.write_text(printed.getvalue())
        log.with_suffix(".changes").write_text(str(changes))


def files_of(place):
    """The files of a folder that are the same in two equal runs."""
    files = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {path.relative_to(place).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not NOT_COMPARED.search(name)}


class Chain:
    """The tiny chain on two generations of inputs: the folder before and after each stage in the second."""

    def __init__(self, folder, stages):
        self.folder, self.log = folder, folder / "log"
        self.before, self.after, self.changes = {}, {}, {}
        self.server = ForkServer(warm_up, stages)
        place = make_place(folder / "chain")
        for generation in range(2):
            write_inputs(place, generation)
            for stage in stages:
                if generation:
                    shutil.copytree(place, folder / "before" / stage, symlinks=True)
                    self.before[stage] = files_of(place)
                assert self.run(stage, place) == 0, self.log.read_text()
                if generation:
                    self.after[stage] = files_of(place)
                    self.changes[stage] = int(self.log.with_suffix(".changes").read_text())
                    assert self.after[stage] != self.before[stage]

    def run(self, stage, place, *interruption):
        self.log.write_text("")
        return self.server.run(run_interrupted, stage, place, self.log, *interruption)

    def check_old_or_new(self, stage, found):
        """Each output is old, new or, between two renames of a folder, missing; all else is unchanged."""
        outs = outs_of(stage)

        def part(files, out):
            return {name: content for name, content in files.items() if f"{name}/".startswith(f"{out}/")}

        def rest(files):
            return {name: files[name] for name in files if not name.startswith((".state/", *outs))}

        complete = {name: content for name, content in found.items() if not LEFTOVER.search(name)}
        for out in outs:
            now, old, new = (part(files, out) for files in (complete, self.before[stage], self.after[stage]))
            is_partial_curve = out == CURVE and new[out].startswith(now.get(out, b""))
            is_missing = not now and out not in self.before[stage]
            assert now in (old, new) or is_partial_curve or is_missing, out
        assert rest(complete) == rest(self.before[stage])


def try_moment(chain, stage, way, at):
    place = chain.folder / "work"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(chain.folder / "before" / stage, place, symlinks=True)
    code = chain.run(stage, place, way, at)
    printed = chain.log.read_text()
    allowed = {"kill": {-signal.SIGKILL}, "stop": {STOPPED}, "full disk": {DiskFull.exit_code, 0}}
    if stage == "training":
        allowed["stop"] |= {Busy.exit_code, 0}
    assert code in allowed[way], printed
    assert "Traceback" not in printed
    assert printed.count("error: ") == (code in (DiskFull.exit_code, Busy.exit_code)), printed
    chain.check_old_or_new(stage, files_of(place))
    assert chain.run(stage, place) == 0, chain.log.read_text()
    assert files_of(place) == chain.after[stage]


@pytest.mark.parametrize(
    ("stages", "per_stage"),
    [
        pytest.param(QUICK, 5, marks=pytest.mark.slow, id="quick stages"),
        pytest.param(STAGES, 15, marks=pytest.mark.robustness, id="all stages"),
    ],
)
def test_an_interrupted_stage_leaves_old_or_new_outputs_and_the_next_run_ends_the_same(
    tmp_path, stages, per_stage
):
    """Each stage is interrupted at moments spread over its changes, one way after the other."""
    chain = Chain(tmp_path, stages)
    with closing(chain.server):
        for stage, changes in chain.changes.items():
            step = max(1, changes // per_stage)
            for number, at in enumerate(range(step // 2, changes, step)):
                way = WAYS[number % len(WAYS)]
                try:
                    try_moment(chain, stage, way, at)
                except AssertionError as error:
                    raise AssertionError(f"{stage}, {way} before change {at} of {changes}") from error
