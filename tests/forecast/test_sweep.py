"""A sweep of runs that follow a law gives that law back, and predicts other runs within its interval."""

import math

import numpy as np
import pytest

from compactgpt.common.errors import BadConfig, BadData
from compactgpt.common.storage import write_json
from compactgpt.forecast import sweep
from compactgpt.forecast.estimate import estimate
from compactgpt.forecast.scaling_laws import run_of
from compactgpt.forecast.sweep import FORMS, Sweep, SweepRun, fit_runs, predict_loss, sweep_report
from tests.support.comparison_inputs import PARAMS, ROOT

SIZES, BUDGETS = (1_000_000, 2_000_000, 4_000_000), (100, 200, 400)


def make_run(size, steps, loss):
    return SweepRun(
        name=f"{size}-{steps}", group="a", params={}, seed=1, num_params=size,
        num_params_non_embedding=size // 10, max_steps=steps, tokens_per_step=512, optimizer="muon",
        loss=loss,
    )  # fmt: skip


def product(n, d):
    return 60 * n**-0.05 * d**-0.15


def runs_of(noise=0.0):
    generator = np.random.default_rng(0)
    return [
        make_run(n, s, product(n, 512 * s) * math.exp(noise * generator.normal()))
        for n in SIZES
        for s in BUDGETS
    ]


@pytest.fixture(scope="module")
def fit():
    return fit_runs(runs_of(0.01), 16)


@pytest.fixture
def finished(fit):
    return Sweep(
        corpus=sweep.corpus_settings(PARAMS), settings=sweep.recipe(PARAMS), data_sha256="0" * 64,
        train_tokens=1_000_000, val_tokens=10_000, runs=tuple(runs_of()), fit=fit,
    )  # fmt: skip


def test_exact_runs_give_their_law_back_and_one_outlier_hardly_moves_it():
    runs = runs_of()
    exact = fit_runs(runs, 4)
    assert exact.form == "product"
    assert exact.constants == pytest.approx((math.log(60), 0.05, 0.15), rel=1e-5)
    runs[4] = make_run(SIZES[1], BUDGETS[1], runs[4].loss * 1.5)
    assert fit_runs(runs, 4).constants == pytest.approx((math.log(60), 0.05, 0.15), rel=0.05)
    with pytest.raises(BadData, match="2 runs are too few for a scaling law"):
        fit_runs(runs[:2])


@pytest.mark.parametrize(("form", "floor"), [("floor", 2.0), ("sum", 0.0)])
def test_the_form_that_the_runs_show_is_found(form, floor):
    def law(n, d):
        return floor + 30 / n**0.25 + 200 / d**0.4

    sizes, budgets = (10**5, 10**6, 10**7, 10**8), (10, 100, 1000, 10_000)
    found = fit_runs([make_run(n, s, law(n, 512 * s)) for n in sizes for s in budgets], 4)
    assert found.form == form
    assert predict_loss(found, 10**9, 512 * 100_000).value == pytest.approx(law(1e9, 512e5), rel=1e-3)


def test_another_run_of_the_law_lies_in_the_interval_whose_bounds_are_quantiles(fit):
    found = predict_loss(fit, 7_000_000, 384_000)
    assert found.low_95 < product(7e6, 384_000) < found.high_95
    assert found.high_95 - found.low_95 < 0.6
    log_losses = [FORMS[fit.form].log_loss(c, 7_000_000, 384_000) for c in fit.draws]
    losses = [math.exp(loss + miss) for loss in log_losses for miss in fit.misses]
    bounds = np.quantile(losses, [0.025, 0.1, 0.5, 0.9, 0.975])
    found_bounds = [found.low_95, found.low_80, found.value, found.high_80, found.high_95]
    assert found_bounds == pytest.approx(bounds, rel=1e-5)


def test_the_shipped_fit_predicts_the_losses_of_its_own_runs():
    shipped = sweep.read_sweep(ROOT / "results/ladder.json")
    again, fit = fit_runs(shipped.runs, 4), shipped.fit
    assert (again.form, again.constants, again.misses) == (fit.form, fit.constants, fit.misses)
    for run in shipped.runs:
        predicted = predict_loss(fit, run.num_params, run.tokens).value
        assert predicted == pytest.approx(run.loss, rel=0.01)


def test_the_report_predicts_the_configured_run_unless_text_or_settings_differ(finished, fit):
    run = run_of(PARAMS.model, PARAMS.training)
    report = sweep_report(finished, PARAMS)
    assert report["differs"] == []
    assert report["expected_loss"] == predict_loss(fit, run.num_params, run.tokens).model_dump()
    assert estimate(PARAMS, finished)["compact"]["epochs"] == run.tokens / 1_000_000
    changes = {"corpus": {"corpus": "files"}, "settings": finished.settings | {"training.optimizer": "adamw"}}
    report = sweep_report(finished.model_copy(update=changes), PARAMS)
    assert (report["expected_loss"], report["differs"]) == (None, ["corpus", "training.optimizer"])


def test_the_command_adds_the_fit_to_the_runs_and_prints_the_prediction(finished, tmp_path):
    path = tmp_path / "ladder.json"
    assert sweep.read_sweep(path) is None
    write_json(path, finished.model_copy(update={"fit": None}).model_dump(mode="json"))
    with pytest.raises(BadData, match="compactgpt experiment fit"):
        sweep_report(sweep.read_sweep(path), PARAMS)
    printed = sweep.fit_sweep(path, ROOT / "params.yaml").splitlines()
    assert printed[0] == "1000000-100: 5.9124, fitted 5.9124"
    assert printed[-1].startswith("the configured run: ")
    assert sweep.read_sweep(path).fit.form == "product"
    other = finished.model_copy(update={"settings": finished.settings | {"training.beta1": 0.7}})
    write_json(path, other.model_dump(mode="json"))
    printed = sweep.fit_sweep(path, ROOT / "params.yaml").splitlines()
    assert printed[-1] == "no prediction: the configured run differs from the sweep in training.beta1"
    path.write_text("{}")
    with pytest.raises(BadConfig, match="runs: missing key"):
        sweep.read_sweep(path)
