"""Laws say what they were fitted on; golden numbers and the frozen rule are in test_estimate."""

from pathlib import Path

import pytest

from compactgpt.config import load_params
from compactgpt.forecast.scaling_laws import LAWS, Run, run_of

ROOT = Path(__file__).parents[2]
LAW = {law.name: law for law in LAWS}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_parametric_law_is_its_stated_constants(law):
    run = Run(10**8, 8 * 10**7, 10_000, 500_000)
    c = law.constants
    if law.formula.startswith("E"):
        expected = c["E"] + c["A"] / 1e8 ** c["alpha"] + c["B"] / 5e9 ** c["beta"]
        assert law.loss(run) == pytest.approx(expected, rel=1e-12)
    else:  # infinite batches and steps leave the size alone
        endless = Run(10**8, 8 * 10**7, 10**12, 10**12)
        assert law.loss(endless) == pytest.approx((c["Nc"] / 8e7) ** c["aN"], rel=1e-6)


def test_a_run_is_inside_a_laws_range_or_not():
    note = Run(29_938_560, 10_621_824, 20_000, 32_768)
    assert LAW["kaplan-2020"].inside(note)
    assert not LAW["hoffmann-2022"].inside(note)  # fewer parameters and tokens
    assert LAW["hoffmann-2022"].inside(Run(7 * 10**7, 1, 10_000, 500_000))
    assert not LAW["hoffmann-2022"].inside(Run(7 * 10**7, 1, 10_000, 499_999))
    assert not LAW["kaplan-2020"].inside(Run(10**10, 767, 10_000, 500_000))


def test_an_anchor_is_a_run():
    anchor = load_params(ROOT / "params.yaml").estimate.anchors[0]
    assert run_of(anchor).tokens == anchor.max_steps * anchor.tokens_per_step
