"""What the documentation shows is what the commands say."""

import re

import pytest
from typer.testing import CliRunner

from compactgpt import experiments
from compactgpt.cli import app
from compactgpt.common.errors import BadConfig
from compactgpt.forecast import whatif
from tests.support.comparison_inputs import ROOT

TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
REAL_RUN = (ROOT / "docs/real-run.md").read_text()
SHOWN = dict(re.findall(r"```\n\$ compactgpt ([^\n]*)\n(.*?)```", TUTORIAL, re.DOTALL))
WITHOUT_DATA = [words for words in SHOWN if words.split()[0] in ("estimate", "experiment", "trace")]


def test_there_is_something_to_compare():
    assert len(WITHOUT_DATA) == 3


@pytest.mark.parametrize("words", WITHOUT_DATA)
def test_the_tutorial_shows_what_the_command_says(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    shown, said = SHOWN[words], done.output
    if words.startswith("trace"):  # a new run of the demo has new figures
        shown, said = (re.sub(r"\d[\d.]*", "0", text) for text in (shown, said))
    assert set(shown.splitlines()) - {"..."} <= set(said.splitlines())


def test_the_tutorials_typo_is_told_in_those_words(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("  max_steps: ", "  max_stps: ", 1))
    with pytest.raises(BadConfig) as refused:
        whatif.changed(path, [])
    assert str(refused.value).replace(str(path), "params.yaml") in TUTORIAL


@pytest.mark.parametrize("words", ["experiment show nte", "experiment list", "export out"])
def test_what_the_tutorial_breaks_is_told_in_those_words(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if "nte" in words else tmp_path)
    done = CliRunner().invoke(app, words.split())
    assert done.output.startswith("error: ")
    assert f"(`compactgpt {words}`" in TUTORIAL
    assert done.output in TUTORIAL


def test_the_real_run_is_what_the_experiments_say(tmp_path):
    params_file = tmp_path / "params.yaml"
    params_file.write_text((ROOT / "params.yaml").read_text())
    conf = ROOT / "conf"
    told = experiments.apply("note", params_file, [], conf)
    assert f"# {len(told)} values that change" in REAL_RUN
    own = whatif.answer(whatif.changed(params_file, []), ROOT / "results/ladder.json")
    loss, minutes = own["expected_loss"], own["minutes"]
    bounds = f"{loss['low_95']:.2f} to {loss['high_95']:.2f}"
    assert f"{loss['value']:.2f} nats per token expected (95 %: {bounds})" in REAL_RUN
    assert f"{minutes['h100']:.3g} minutes of an H100, {minutes['a100']:.3g} of an A100" in REAL_RUN
    experiments.apply("gpt2-124m", params_file, ["training.launcher.processes=8"], conf)
    minutes = whatif.answer(whatif.changed(params_file, []), ROOT / "results/ladder.json")["minutes"]
    days = {name: minutes[name] / 60 / 24 for name in ("h100", "a100")}
    assert f"{days['h100']:.1f} H100-days or {days['a100']:.1f} A100-days in all" in REAL_RUN


def test_every_apply_of_the_real_run_is_accepted(tmp_path):
    params_file = tmp_path / "params.yaml"
    lines = re.findall(r"experiment apply ([\w-]+)((?: -S [\w.]+=\w+)*)", REAL_RUN)
    assert len(lines) == 5
    for name, settings in lines:
        params_file.write_text((ROOT / "params.yaml").read_text())
        assert experiments.apply(name, params_file, re.findall(r"-S (\S+)", settings), ROOT / "conf")
