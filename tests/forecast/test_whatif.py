"""What-if questions are answered from params.yaml alone, at once, and never with a wrong key."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compactgpt.cli import app
from compactgpt.common.errors import BadConfig
from compactgpt.config import load_params
from compactgpt.forecast import whatif
from compactgpt.forecast.estimate import estimate

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
NO_LADDER = Path("none.json")


def ask(*words):
    return CliRunner().invoke(
        app, ["estimate", "--params", str(ROOT / "params.yaml"), "--ladder", str(NO_LADDER), *words]
    )


def test_an_answer_is_the_estimate_of_the_changed_configuration():
    found = json.loads(ask("--json", "-S", "training.max_steps=100000", "-S", "model.n_layer=12").output)
    changed = PARAMS.model_copy(
        update={
            "training": PARAMS.training.model_copy(update={"max_steps": 100_000}),
            "model": PARAMS.model.model_copy(update={"n_layer": 12}),
        }
    )
    expected = estimate(changed)["compact"]
    same = ("parameters", "tokens", "flops", "memory_bytes", "minutes", "expected_loss", "calibrated_loss")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert found["laws"]["kaplan-2020"]["constants"]["Nc"] == 6.5e13


def test_a_wrong_key_is_refused_with_its_path():
    done = ask("-S", "training.max_stps=1")
    assert done.exit_code == 78
    assert "no key training.max_stps; did you mean max_steps?" in done.output
    with pytest.raises(BadConfig, match="n_embd"):
        whatif.changed(ROOT / "params.yaml", ["model.n_head=3"])


def test_the_table_tells_all_that_the_estimate_has():
    printed = ask().output
    own = estimate(PARAMS)["compact"]
    for number in own["parameters"].values():
        assert f"{number:,}" in printed
    assert f"{own['tokens']:,}" in printed
    for name in ("a100", "h100", "kaplan-2020", "besiroglu-2024", "frozen rule", "calibrated"):
        assert name in printed
    for law in own["laws"].values():
        assert f"{law['loss']:.3f}" in printed
    expected = own["expected_loss"]
    assert f"95 %: {expected['low_95']:.2f} to {expected['high_95']:.2f}" in printed
    assert "this machine" not in printed


def test_a_corpus_whose_tokens_are_stated_has_epochs():
    hub = ["download.corpus=hub", "download.hub.name=openwebtext", "tokenization.val_fraction=0.0005"]
    found = whatif.answer(whatif.changed(ROOT / "params.yaml", hub), NO_LADDER)
    training = PARAMS.training
    tokens = training.max_steps * training.tokens_per_step
    assert found["epochs"] == pytest.approx(tokens / (9_040_017_095 * 0.9995))
    part = whatif.changed(ROOT / "params.yaml", [*hub, "download.max_documents=5"])
    assert whatif.answer(part, NO_LADDER)["epochs"] is None


def test_this_machine_is_measured_when_asked(monkeypatch):
    monkeypatch.setattr(whatif, "GEMM_SECONDS", 0.05)
    found = whatif.answer(PARAMS, NO_LADDER, measure=True)
    here = found["measured_here"]
    assert 1e8 < here["products_flops_per_second"] < 1e14
    share = PARAMS.estimate.utilisation_of_products
    seconds = found["flops"]["with_attention"] / (here["products_flops_per_second"] * share)
    assert here["minutes"] == pytest.approx(seconds / 60)
    assert "measured just now: no report has it" in whatif.table(found)


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(0.01, "0.6 s"), (3.0, "3 min"), (180.0, "3 h"), (60 * 24 * 15.5, "15.5 days")],
)
def test_times_are_told_in_the_unit_that_fits(minutes, words):
    assert whatif._duration(minutes) == words


def test_an_answer_loads_no_torch_and_takes_two_seconds_of_processor_at_most():
    code = (
        "import sys, time; from typer.testing import CliRunner; from compactgpt.cli import app; "
        "assert CliRunner().invoke(app, ['estimate', '-S', 'training.max_steps=9']).exit_code == 0; "
        "print({'torch', 'numpy', 'scipy', 'mlflow'} & set(sys.modules), time.process_time() < 2)"
    )
    begin = time.monotonic()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set() True\n"
    assert time.monotonic() - begin < 60


def finish(root, stage, seconds, status="FINISHED", start_ms=1000):
    """Leave the journal of a stage that took so long."""
    folder = root / ".state/tracking/done" / f"{stage}-{start_ms}"
    folder.mkdir(parents=True)
    lines = [
        {"kind": "start", "stage": stage, "time_ms": start_ms},
        {"kind": "end", "status": status, "time_ms": start_ms + 1000 * seconds},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_before_a_run_its_time_on_this_machine_is_announced_and_that_of_the_neural_baselines(
    tmp_path, monkeypatch
):
    params = whatif.changed(ROOT / "params.yaml", [])
    monkeypatch.setattr(whatif, "measured_flops", lambda: 1e11)
    training, baseline = whatif.announcement([params], tmp_path)
    share = params.estimate.utilisation_of_products
    minutes = whatif.answer(params, tmp_path / "none")["flops"]["with_attention"] / (1e11 * share) / 60
    assert training.startswith(f"training: about {minutes:.3g} min at this machine's speed")
    assert baseline.startswith("baseline smollm2-135m: not measured here yet")
    twice, _ = whatif.announcement([params, params], tmp_path)
    assert f"about {2 * minutes:.3g} min" in twice
    finish(tmp_path, "baseline@smollm2-135m", 600)
    finish(tmp_path, "baseline@smollm2-135m", 840, start_ms=2000)
    finish(tmp_path, "baseline@smollm2-135m", 5, "KILLED", start_ms=3000)
    finish(tmp_path, "training", 7)
    assert "baseline smollm2-135m: 14 min when it last ran here" in whatif.announcement([params], tmp_path)[1]
    quick = whatif.changed(ROOT / "params.yaml", ["baseline.names=[unigram, xz]"])
    assert len(whatif.announcement([quick], tmp_path)) == 1


def test_experiment_run_announces_the_time_before_dvc_starts(monkeypatch):
    from compactgpt import experiments

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiments, "run", lambda *_: typer.echo("DVC runs") or ["one"])
    done = CliRunner().invoke(app, ["experiment", "run", "shakespeare"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    starts = [line.partition(":")[0] for line in lines]
    assert starts[:3] == ["training", "baseline smollm2-135m", "DVC runs"]
