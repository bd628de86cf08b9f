"""The estimate, as a stage and as a command that answers at once and never accepts a wrong key."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.experiments import load_changed_params
from compactgpt.forecast.estimate import estimate, format_estimate
from compactgpt.forecast.scaling_laws import expect_loss, run_of
from compactgpt.forecast.sweep import read_sweep
from stages.estimate import app as stage
from tests.support.comparison_inputs import PARAMS, ROOT


def test_the_stage_writes_the_estimate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {}\n")  # the stage checks the files that DVC reads
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    done = CliRunner().invoke(stage, ["--tracker", "none"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "reports/estimate.json").read_text()) == estimate(PARAMS)


def test_the_notes_headline_is_the_rules_next_to_the_hand_set_forecast():
    note, settings = estimate(PARAMS)["note"], PARAMS.estimate
    used = [anchor for anchor in settings.anchors if not anchor.assumed_budget]
    rule = expect_loss(run_of(settings.note, settings.note), "adamw", 50_257, used)
    assert note["expected_loss"] == rule.model_dump()
    assert "owt-small-328m" in rule.basis  # with 45M parameters the nearest in compute
    bounds = [note["hand_set_loss"][key] for key in ("low_95", "low_80", "value", "high_80", "high_95")]
    assert bounds == [3.82, 3.90, 4.00, 4.12, 4.20]


def test_the_demos_estimate_states_what_limits_its_worth():
    own = estimate(PARAMS)["compact"]
    assert own["epochs"] is None
    assert any("extrapolated far below" in note for note in own["notes"])
    assert any("docstrings, for which no law is calibrated" in note for note in own["notes"])
    worse = {name for name, law in own["laws"].items() if not law["better_than_guessing"]}
    assert worse == {"besiroglu-2024"}


def test_the_command_estimates_the_changed_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["-S", "training.max_steps=100000", "-S", "model.n_layer=12"]
    found = json.loads(CliRunner().invoke(app, ["estimate", "--json", *words]).output)
    params = load_changed_params(ROOT / "params.yaml", words[1::2])
    assert found == estimate(params, read_sweep(ROOT / "results/ladder.json"))
    assert found["compact"]["tokens"] == 100_000 * PARAMS.training.tokens_per_step


def test_the_table_has_all_figures_of_the_estimate_and_of_the_sweep():
    report = estimate(PARAMS, read_sweep(ROOT / "results/ladder.json"))
    printed, own = format_estimate(report, PARAMS.estimate), report["compact"]
    expected = own["expected_loss"]
    wanted = [f"{number:,}" for number in (*own["parameters"].values(), own["tokens"])]
    wanted += [f"{law['loss']:.3f}" for law in own["laws"].values()]
    wanted += [f"95 %: {expected['low_95']:.2f} to {expected['high_95']:.2f}", "h100", "calibrated"]
    wanted += ["the law of our sweep            does not apply: the sweep's runs have another "]
    assert [text for text in wanted if text not in printed] == []
    report["ladder"]["expected_loss"] = expected
    assert re.search(r"the law of our sweep +\d\.\d\d  \(80 %", format_estimate(report, PARAMS.estimate))


def test_a_data_set_whose_tokens_are_stated_has_epochs():
    hub = ["download.corpus=hub", "download.hub.name=openwebtext", "tokenization.val_fraction=0.0005"]
    found = estimate(load_changed_params(ROOT / "params.yaml", hub))["compact"]
    tokens = PARAMS.training.max_steps * PARAMS.training.tokens_per_step
    assert found["epochs"] == pytest.approx(tokens / (9_040_017_095 * 0.9995))
    part = load_changed_params(ROOT / "params.yaml", [*hub, "download.max_documents=5"])
    assert estimate(part)["compact"]["epochs"] is None


def test_the_command_loads_no_torch_and_takes_two_seconds_of_processor_at_most():
    code = (
        "import sys, time; from typer.testing import CliRunner; from compactgpt.cli import app; "
        "assert CliRunner().invoke(app, ['estimate', '-S', 'training.max_steps=9']).exit_code == 0; "
        "print({'torch', 'scipy', 'mlflow'} & set(sys.modules), time.process_time() < 2)"
    )
    plain = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set() True\n"
