"""Each measured run is told by the others, and the widened interval holds the stated share of them."""

import math
from pathlib import Path

import pytest

from compactgpt.config import load_params
from compactgpt.forecast.calibration import Calibration, Check, calibrate
from compactgpt.forecast.estimate import expected
from compactgpt.forecast.scaling_laws import expect, run_of

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
ANCHORS = PARAMS.estimate.anchors
VOCABULARY = 50257


def test_a_run_is_never_told_by_itself():
    found = calibrate(ANCHORS, (), VOCABULARY)
    known = [anchor for anchor in ANCHORS if not anchor.assumed_budget]
    for check in found.checks:
        others = tuple(anchor for anchor in known if anchor.name != check.name)
        (anchor,) = (anchor for anchor in ANCHORS if anchor.name == check.name)
        told = expect(run_of(anchor), anchor.optimizer, VOCABULARY, others)
        assert (check.low_80, check.value, check.high_95) == (told.low_80, told.value, told.high_95)
        assert check.inside_80 == (told.low_80 <= anchor.loss <= told.high_80)
        assert check.name not in told.basis


def test_runs_of_an_assumed_budget_tell_nothing():
    without = tuple(anchor for anchor in ANCHORS if not anchor.assumed_budget)
    assert len(without) < len(ANCHORS)
    told = {check.name: check.value for check in calibrate(ANCHORS, (), VOCABULARY).checks}
    alone = {check.name: check.value for check in calibrate(without, (), VOCABULARY).checks}
    assert {name: told[name] for name in alone} == alone
    changed = PARAMS.model_copy(update={"estimate": PARAMS.estimate.model_copy(update={"anchors": without})})
    assert expected(changed) == expected(PARAMS)


def checks(factors):
    one = calibrate(ANCHORS, (), VOCABULARY).checks[0]
    return Calibration(
        ANCHORS[:3],
        tuple(Check(**{**vars(one), "factor": factor, "name": str(factor)}) for factor in factors),
    )


@pytest.mark.parametrize(
    ("factors", "share", "factor"),
    [
        ([0.1 * n for n in range(1, 10)], 0.80, 0.8),  # ceil(0.8 x 10) = 8th of 9
        ([0.1 * n for n in range(1, 10)], 0.95, 0.9),  # the 10th of 9: the largest stands in
        ([float(n) for n in range(1, 20)], 0.95, 19.0),  # 19 runs are just enough: the 19th
        ([3.0, 1.0, 2.0], 0.5, 2.0),
    ],
)
def test_the_factor_is_the_conformal_quantile(factors, share, factor):
    assert checks(factors).factor(share) == pytest.approx(factor)


def test_the_widened_interval_is_the_rules_times_the_factor():
    found = checks([0.5, 0.7, 1.5, 2.5])
    run = run_of(ANCHORS[0])
    told = expect(run, "muon", VOCABULARY, found.anchors)
    wide = found.widened(run, "muon", VOCABULARY)
    half = (told.high_80 - told.low_80) / 2
    assert (wide.high_80 - wide.low_80) / 2 == pytest.approx(half * 2.5)  # ceil(0.8 x 5) = 4th
    assert (wide.high_95 - wide.low_95) / 2 == pytest.approx(half * 2.5)
    assert wide.high_95 <= math.log(VOCABULARY)


def test_the_report_counts_what_held():
    report = calibrate(ANCHORS, (), VOCABULARY).report()
    assert report["of"] == len(ANCHORS) == len(report["checks"])
    assert report["held_95"] == sum(c["low_95"] <= c["measured"] <= c["high_95"] for c in report["checks"])
    assert report["held_80"] <= report["held_95"]
