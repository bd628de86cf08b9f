"""Each measured run is predicted from the others, and the widened interval holds the stated share of them."""

import math

import pytest

from compactgpt.forecast.calibration import Calibration, calibrate
from compactgpt.forecast.estimate import expected_loss
from compactgpt.forecast.scaling_laws import expect_loss, reference_run
from tests.support.comparison_inputs import PARAMS

ANCHORS = PARAMS.estimate.anchors
VOCABULARY = 50257


def test_a_run_is_never_predicted_from_itself():
    report = calibrate(ANCHORS, (), VOCABULARY).report()
    known = [anchor for anchor in ANCHORS if not anchor.assumed_budget]
    for anchor, check in zip(ANCHORS, report["checks"], strict=True):
        others = [other for other in known if other.name != anchor.name]
        rule = expect_loss(reference_run(anchor), anchor.optimizer, VOCABULARY, others)
        assert (check["low_80"], check["value"], check["high_95"]) == (rule.low_80, rule.value, rule.high_95)
        assert check["inside_80"] == (rule.low_80 <= anchor.loss <= rule.high_80)
    held = sum(check["low_95"] <= check["measured"] <= check["high_95"] for check in report["checks"])
    assert (report["of"], report["held_95"]) == (len(ANCHORS), held)
    assert report["held_80"] <= held


def test_runs_of_an_assumed_budget_predict_no_others():
    without = tuple(anchor for anchor in ANCHORS if not anchor.assumed_budget)
    assert len(without) < len(ANCHORS)
    values = {check["name"]: check["value"] for check in calibrate(ANCHORS, (), VOCABULARY).checks}
    assert all(check["value"] == values[check["name"]] for check in calibrate(without, (), VOCABULARY).checks)
    changed = PARAMS.model_copy(update={"estimate": PARAMS.estimate.model_copy(update={"anchors": without})})
    assert expected_loss(changed) == expected_loss(PARAMS)


@pytest.mark.parametrize(
    ("factors", "share", "factor"),
    [
        ([0.1 * n for n in range(1, 10)], 0.80, 0.8),  # ceil(0.8 x 10) = 8th of 9
        ([0.1 * n for n in range(1, 10)], 0.95, 0.9),  # the 10th of 9: the largest instead
        ([float(n) for n in range(1, 20)], 0.95, 19.0),  # 19 runs are just enough: the 19th
        ([3.0, 1.0, 2.0], 0.5, 2.0),
    ],
)
def test_the_factor_is_the_conformal_quantile(factors, share, factor):
    found = Calibration(ANCHORS[:3], tuple({"factor": each} for each in factors))
    assert found.factor(share) == pytest.approx(factor)


def test_the_calibrated_interval_is_the_rules_times_the_factor():
    found = Calibration(ANCHORS[:3], tuple({"factor": each} for each in (0.5, 0.7, 1.5, 2.5)))
    run = reference_run(ANCHORS[0])
    rule = expect_loss(run, "muon", VOCABULARY, found.anchors)
    wide = found.calibrated_loss(run, "muon", VOCABULARY)
    assert wide.high_80 - wide.low_80 == pytest.approx(
        2.5 * (rule.high_80 - rule.low_80)
    )  # ceil(0.8 x 5) = 4th
    assert wide.high_95 - wide.low_95 == pytest.approx(2.5 * (rule.high_80 - rule.low_80))
    assert wide.high_95 <= math.log(VOCABULARY)
