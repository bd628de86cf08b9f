"""A ladder of runs that obey a law gives that law back, and tells other runs of it within its interval."""

import math
from pathlib import Path

import numpy as np
import pytest

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.storage import write_json
from compactgpt.config import load_params
from compactgpt.forecast import fitting
from compactgpt.forecast.estimate import configured_run, estimate
from compactgpt.forecast.fitting import draw
from compactgpt.forecast.sweep import (
    FORMS,
    Fit,
    Ladder,
    Rung,
    corpus_of,
    ladder_report,
    predict,
    read_ladder,
    settings_of,
)

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
SIZES, BUDGETS = (1_000_000, 2_000_000, 4_000_000), (100, 200, 400)


def fit(rungs, resamples=4):
    return fitting.fit(rungs, resamples)


def rung(size, steps, loss):
    return Rung(
        name=f"{size}-{steps}",
        num_params=size,
        num_params_non_embedding=size // 10,
        max_steps=steps,
        tokens_per_step=512,
        optimizer="muon",
        loss=loss,
        params_sha256="0" * 64,
        model_md5="0" * 32,
    )


def rungs_of(law, noise=0.0):
    generator = np.random.default_rng(0)
    return [
        rung(n, s, law(n, 512 * s) * math.exp(noise * generator.normal())) for n in SIZES for s in BUDGETS
    ]


def product(n, d):
    return 60 * n**-0.05 * d**-0.15


@pytest.fixture(scope="module")
def found():
    return fit(rungs_of(product, 0.01), 16)


def ladder(found, **changes):
    about = {
        "corpus": corpus_of(PARAMS),
        "settings": settings_of(PARAMS),
        "data_sha256": "0" * 64,
        "train_tokens": 1_000_000,
        "val_tokens": 10_000,
        "rungs": tuple(rungs_of(product)),
        "fit": found,
    }
    return Ladder(**{**about, **changes})


def test_forms_are_their_formulas():
    n, d = math.log(1e6), math.log(1e5)
    c = (math.log(1.7), math.log(400), 0.34, math.log(410), 0.28)
    expected = 1.7 + 400 / 1e6**0.34 + 410 / 1e5**0.28
    assert math.exp(FORMS["floor"].log_loss(c, n, d)) == pytest.approx(expected)
    assert math.exp(FORMS["sum"].log_loss(c[1:], n, d)) == pytest.approx(expected - 1.7)
    assert math.exp(FORMS["product"].log_loss((2.0, 0.1, 0.2), n, d)) == pytest.approx(
        math.exp(2) / 1e6**0.1 / 1e5**0.2
    )


def test_exact_runs_give_their_law_back():
    exact = fit(rungs_of(product))
    assert exact.constants == pytest.approx((math.log(60), 0.05, 0.15), rel=1e-5)
    assert exact.form == "product"


def test_a_law_with_a_floor_is_seen_where_the_runs_carry_it():
    """With five budgets and sizes, and no noise, the product can't pass for the sum of three."""

    def law(n, d):
        return 2.0 + 30 / n**0.25 + 200 / d**0.4

    runs = [
        rung(n, s, law(n, 512 * s)) for n in (10**5, 10**6, 10**7, 10**8) for s in (10, 100, 1000, 10_000)
    ]
    found = fit(runs)
    assert found.form == "floor"
    assert predict(found, 10**9, 512 * 100_000).value == pytest.approx(law(1e9, 512e5), rel=1e-3)


def test_another_run_of_the_law_lies_in_the_interval(found):
    told = predict(found, 7_000_000, 384_000)
    truth = product(7e6, 384_000)
    assert told.low_95 < truth < told.high_95
    assert told.low_95 < told.low_80 < told.value < told.high_80 < told.high_95
    assert told.high_95 - told.low_95 < 0.6


def test_a_runaway_run_does_not_drag_the_law(found):
    runs = rungs_of(product)
    runs[4] = rung(SIZES[1], BUDGETS[1], runs[4].loss * 1.5)
    assert fit(runs).constants == pytest.approx((math.log(60), 0.05, 0.15), rel=0.05)


def test_fitting_twice_gives_the_same_bytes(found):
    assert fit(rungs_of(product, 0.01), 16) == found


def test_too_few_runs_are_refused():
    with pytest.raises(BadData, match="2 runs carry no scaling law"):
        fit([rung(1, 1, 5.0), rung(2, 2, 4.0)])


def test_the_quantiles_are_numpys(found):
    told = predict(found, 7_000_000, 384_000)
    form, n, d = FORMS[found.form], math.log(7e6), math.log(384_000)
    losses = [math.exp(form.log_loss(c, n, d) + miss) for c in found.draws for miss in found.misses]
    bounds = np.quantile(losses, [0.025, 0.1, 0.5, 0.9, 0.975])
    assert [told.low_95, told.low_80, told.value, told.high_80, told.high_95] == pytest.approx(
        bounds, rel=1e-5
    )


def test_the_report_tells_the_configured_run_and_what_to_draw(found):
    run = configured_run(PARAMS)
    report = ladder_report(ladder(found), PARAMS, run)
    assert report["differs"] == []
    assert report["expected_loss"] == predict(found, run.num_params, run.tokens).model_dump()
    assert {curve["num_params"] for curve in report["curves"]} == {*SIZES, run.num_params}
    assert report["curves"][-1]["loss"][-1] == report["expected_loss"]["value"]
    assert estimate(PARAMS, ladder(found))["compact"]["epochs"] == run.tokens / 1_000_000


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"corpus": {"corpus": "files"}}, ["corpus"]),
        ({"settings": settings_of(PARAMS) | {"training.optimizer": "adamw"}}, ["training.optimizer"]),
    ],
)
def test_a_ladder_of_other_text_or_settings_tells_nothing(found, changes, differs):
    report = ladder_report(ladder(found, **changes), PARAMS, configured_run(PARAMS))
    assert (report["expected_loss"], report["differs"], report["curves"]) == (None, differs, [])


def test_size_budget_and_chance_are_no_difference():
    other = PARAMS.model_copy(
        update={
            "model": PARAMS.model.model_copy(update={"n_embd": 64, "n_layer": 9}),
            "training": PARAMS.training.model_copy(update={"max_steps": 9, "seed": 9, "eval_windows": 9}),
        }
    )
    assert settings_of(other) == settings_of(PARAMS)


def test_a_ladder_is_read_back_or_absent(found, tmp_path):
    assert read_ladder(tmp_path / "ladder.json") is None
    write_json(tmp_path / "ladder.json", ladder(found).model_dump(mode="json"))
    assert read_ladder(tmp_path / "ladder.json") == ladder(found)
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(BadConfig, match="rungs: missing key"):
        read_ladder(tmp_path / "ladder.json")


def test_the_picture_is_a_png(found, tmp_path):
    draw(ladder(found), tmp_path / "a.png", [(7_000_000, 384_000)])
    draw(ladder(found), tmp_path / "b.png", [(7_000_000, 384_000)])
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "b.png").read_bytes()
    assert isinstance(found, Fit)
