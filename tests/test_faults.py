"""Whatever interrupts a stage, at whichever of its writes: the next run ends with the same bytes.

Each test walks one stage, its real door on the tiny chain of tests/tiny_chain.py, operation by operation: a
point is (stage, number of the operation, kind of fault). `make test` tries some points of some stages,
`make test-faults` more of all of them, FAULT_POINTS=0 each one there is; the last line says how many.
"""

import json
import os
import re
import shutil
import signal

import pytest

from compactgpt.errors import Busy, DiskFailed, DiskFull
from tests import forks
from tests.disk import Fault
from tests.tiny_chain import STAGES, make_place, outs_of, run_quietly, warm_up, write_inputs

ALL_STAGES = "FAULT_POINTS" in os.environ
KINDS = ("kill", "term", "full", "broken", "twin", "short")
# Great Expectations and matplotlib take ten seconds to be imported.
QUICK = ("estimate", "download", "tokenization", "training", "baseline@unigram")
WALKED = STAGES if ALL_STAGES else QUICK
# Points of a stage, spread over its operations and kinds; FAULT_POINTS=0 tries each one there is.
POINTS = int(os.environ.get("FAULT_POINTS", "4"))
STOPPED = 143  # what a stage ends with at SIGTERM
# What may differ between two runs: of the state, and Great Expectations' pages, which have their times.
NOT_COMPARED = re.compile(r"\.state/(tracking|locks)/|data/data_docs/")
LEFTOVER = re.compile(r"(^|/)\.[^/]+\.\d+\.(tmp|old)(/|$)")


def struck(stage, place, said, at, kind):
    """Run a stage with one fault; for forks."""
    fault = Fault(place, at, kind, lambda: run_twin(stage, place, said))
    try:
        with fault:
            run_quietly(stage, place, said)
    finally:
        said.with_suffix(".json").write_text(json.dumps(fault.names))


def run_twin(stage, place, said):
    """The same stage in another process, at the same time and place: it is told, or it came first."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text = said.with_suffix(".twin").read_text()
        assert code in (Busy.exit_code, 0), text
        assert (code == 0) != ("error: stage" in text and "is already running here" in text), text
        assert "Traceback" not in text
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os._exit(forks.exit_code_of(struck, (stage, place, said.with_suffix(".twin"), -1, "kill")))


def tree(place):
    """Every file of a place that two equal runs share."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    found = {path.relative_to(place).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in found.items() if not NOT_COMPARED.search(name)}


class Chain:
    """The stages of the second generation: what each begins with and ends with, and its operations."""

    def __init__(self, folder):
        self.folder, self.said = folder, folder / "said"
        self.begins, self.begun, self.ended, self.names = {}, {}, {}, {}
        self.zygote = forks.Zygote(warm_up, WALKED, seconds=300)
        place = make_place(folder / "chain")
        for generation in range(2):
            write_inputs(place, generation)
            for stage in WALKED:
                if generation:
                    shutil.copytree(place, folder / "begin" / stage, symlinks=True)
                    self.begun[stage] = tree(place)
                assert self.run(stage, place) == 0, self.said.read_text()
                if generation:
                    self.ended[stage] = tree(place)
                    self.names[stage] = json.loads(self.said.with_suffix(".json").read_text())
                    assert any(
                        self.ended[stage].get(out) != self.begun[stage].get(out) for out in self.ended[stage]
                    )

    def run(self, stage, place, at=-1, kind="kill"):
        return self.zygote.run(struck, stage, place, self.said, at, kind)

    def work(self, stage):
        """A place as it is before the stage."""
        place = self.folder / "work"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / "begin" / stage, place, symlinks=True)
        return place


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    made = Chain(tmp_path_factory.mktemp("chain"))
    yield made
    made.zygote.close()


def points_of(names):
    """Number and kind of each fault that is tried at operations of these names."""
    points = [
        (number, kind)
        for number, name in enumerate(names)
        for kind in KINDS
        if kind != "short" or name == "write"
    ]
    step = max(1, len(points) // POINTS) | 1 if POINTS else 1  # odd, so that all kinds come
    return points[step // 2 :: step]


def check_ended(kind, code, stage, text):
    """A run ends as its fault says, and tells it in one sentence."""
    allowed = {"kill": {-signal.SIGKILL}, "short": {-signal.SIGKILL}, "term": {STOPPED}}
    allowed |= {"twin": {0}, "full": {DiskFull.exit_code, 0}, "broken": {DiskFailed.exit_code, 0}}
    if stage == "training":
        allowed["term"] = {STOPPED, Busy.exit_code, 0}
    assert code in allowed[kind], text
    assert "Traceback" not in text
    assert text.count("error: ") == (code in (DiskFull.exit_code, DiskFailed.exit_code, Busy.exit_code)), text


def check_old_or_new(chain, stage, found):
    """Each out is as it was, or as it will be, or a folder is between two renames; all else stays."""
    outs = outs_of(stage)
    whole = {name: content for name, content in found.items() if not LEFTOVER.search(name)}
    for out in outs:
        now, before, after = (
            {name: content for name, content in each.items() if name == out or name.startswith(f"{out}/")}
            for each in (whole, chain.begun[stage], chain.ended[stage])
        )
        assert now in (before, after) or (not now and out not in before), out
    others = [
        {name: content for name, content in each.items() if not name.startswith((".state/", *outs))}
        for each in (whole, chain.begun[stage])
    ]
    assert others[0] == others[1]


def outside_state(files):
    return {name: content for name, content in files.items() if not name.startswith(".state/")}


def try_point(chain, stage, at, kind):
    place = chain.work(stage)
    code = chain.run(stage, place, at, kind)
    check_ended(kind, code, stage, chain.said.read_text())
    found = tree(place)
    check_old_or_new(chain, stage, found)
    if code == 0:  # what the disk did not let it sweep is there
        swept = (each for each in found if not LEFTOVER.search(each) and not each.startswith(".state/"))
        assert {name: found[name] for name in swept} == outside_state(chain.ended[stage])
    assert chain.run(stage, place) == 0, chain.said.read_text()
    assert tree(place) == chain.ended[stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", WALKED)
def test_a_fault_at_any_operation_leaves_old_or_new_and_the_next_run_ends_the_same(chain, stage, counted):
    for at, kind in points_of(chain.names[stage]):
        try:
            try_point(chain, stage, at, kind)
        except AssertionError as error:
            raise AssertionError(f"{stage}, operation {at} ({chain.names[stage][at]}), {kind}") from error
        counted[f"faults of {stage} ({len(chain.names[stage])} operations)"] += 1
        counted["faults in all"] += 1
