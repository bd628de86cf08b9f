"""The documentation shows what the commands print."""

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactgpt import experiments
from compactgpt.cli import app
from compactgpt.experiments import load_changed_params
from compactgpt.forecast.estimate import estimate
from tests.support.comparison_inputs import ROOT

TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
REAL_RUN = (ROOT / "docs/real-run.md").read_text()
SHOWN = dict(re.findall(r"```\n\$ compactgpt ([^\n]*)\n(.*?)```", TUTORIAL, re.DOTALL))


def test_the_caption_of_the_pages_picture_has_the_figures_of_the_reports(monkeypatch):
    """`make pictures` writes both, docs/page.png and docs/page.txt."""
    monkeypatch.chdir(ROOT)
    assert runpy.run_path(str(ROOT / "scripts/pictures.py"))["caption"]() == Path("docs/page.txt").read_text()


@pytest.mark.parametrize(
    "words", ["trace compact.loss", "estimate -S training.max_steps=2800", "experiment show shakespeare"]
)
def test_the_tutorial_shows_what_the_command_prints(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    shown, printed = SHOWN[words], done.output
    if words.startswith("trace"):  # a new run of the demo has new figures
        shown, printed = (re.sub(r"\d[\d.]*", "0", text) for text in (shown, printed))
    assert set(shown.splitlines()) - {"..."} <= set(printed.splitlines())
    if words.startswith("estimate"):
        assert printed.splitlines()[-1] == "next: dvc exp run -S training.max_steps=2800"


def test_the_real_run_quotes_the_estimate(tmp_path):
    params_file = tmp_path / "params.yaml"
    params_file.write_text((ROOT / "params.yaml").read_text())
    experiments.apply("note", params_file, [], ROOT / "conf")
    note = estimate(load_changed_params(params_file, []))["compact"]
    loss, minutes = note["expected_loss"], note["minutes"]
    bounds = f"{loss['low_95']:.2f} to {loss['high_95']:.2f}"
    assert f"{loss['value']:.2f} nats per token expected (95 %: {bounds})" in REAL_RUN
    assert f"{minutes['h100']:.3g} min of an H100, {minutes['a100']:.3g} of an A100 (estimated)" in REAL_RUN
    lines = re.findall(r"experiment apply ([\w-]+)((?: -S [\w.]+=\w+)*)", REAL_RUN)
    assert len(lines) == 4
    for name, settings in lines:
        params_file.write_text((ROOT / "params.yaml").read_text())
        assert experiments.apply(name, params_file, settings.replace("-S ", "").split(), ROOT / "conf")
